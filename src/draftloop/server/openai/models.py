"""`/v1/models`: what is served, under both of its names."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends

from draftloop.server.openai.asking import ALIAS, check_model
from draftloop.server.openai.errors import documented
from draftloop.server.openai.replies import ModelCard, ModelList
from draftloop.server.service import Service, get_service


def models_router() -> APIRouter:
    """The routes. A model's `created` is when this server began to serve it."""
    router, created = APIRouter(), int(time.time())

    def card(name: str) -> ModelCard:
        return ModelCard(id=name, object="model", created=created, owned_by="draftloop")

    @router.get("/v1/models", responses=documented(401, 403))
    async def list_models(service: Annotated[Service, Depends(get_service)]) -> ModelList:
        """The names to ask for: the target's, and one that every server answers to."""
        return ModelList(object="list", data=[card(service.model), card(ALIAS)])

    @router.get("/v1/models/{model:path}", responses=documented(401, 403, 404))
    async def retrieve_model(model: str, service: Annotated[Service, Depends(get_service)]) -> ModelCard:
        """One of them."""
        check_model(service, model)
        return card(model)

    return router
