"""`/health`: the process lives. `/ready`: it takes requests.

Contract: cheap, asked without a key. Must not tell anything about what is served.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel

from draftloop.server.service import Service, get_service

router = APIRouter()


class Status(BaseModel):
    """One word."""

    status: str


@router.get("/health", summary="Whether the process lives")
async def health() -> Status:
    """Always `ok`."""
    return Status(status="ok")


@router.get(
    "/ready",
    summary="Whether requests are taken",
    responses={503: {"model": Status, "description": "Requests are not taken: shutting down, or broken."}},
)
async def ready(service: Annotated[Service, Depends(get_service)], response: Response) -> Status:
    """`ready`, or `shutting down` or `broken` with status 503."""
    snapshot = service.worker.snapshot()
    if snapshot.ready:
        return Status(status="ready")
    response.status_code = 503
    return Status(status="shutting down" if snapshot.draining else "broken")
