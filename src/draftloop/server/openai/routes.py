"""Puts the OpenAI API into an application.

Contract: routes, errors in their shape, and an OpenAPI document that says what is answered: bad fields get
400, never FastAPI's 422, and how the key is sent. Must not know how an answer is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftloop.server.openai import chat, completions
from draftloop.server.openai.errors import install_handlers
from draftloop.server.openai.models import models_router

if TYPE_CHECKING:
    from fastapi import FastAPI


def install(app: FastAPI) -> None:
    """Add the API. Errors of every other route of the application have its shape too."""
    for router in (chat.router, completions.router, models_router()):
        app.include_router(router)
    # A client that sends a slash too many is told so; an empty redirect would say nothing.
    app.router.redirect_slashes = False
    install_handlers(app)
    _describe_truly(app)


def _describe_truly(app: FastAPI) -> None:
    """FastAPI documents its own answer to bad fields, which is never given here."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        for path in document["paths"].values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["api_key"] = {
            "type": "http",
            "scheme": "bearer",
            "description": "server.api_key; without one in the settings any key will do, or none.",
        }
        document["security"] = [{"api_key": []}, {}]
        return document

    app.openapi = described  # type: ignore[method-assign]
