"""``GET /v1/models``: the base and its adapters; ``root`` and ``parent`` tell them apart, as in vLLM."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.adapters.registry import Adapter
from server.api.state import ServerState, State

router = APIRouter()


@router.get("/v1/models")
async def list_models(state: State) -> dict[str, Any]:
    """The base first, then the adapters by name."""
    adapters = [_adapter(adapter, state) for adapter in state.registry.list()]
    return {"object": "list", "data": [_base(state), *adapters]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, state: State) -> dict[str, Any]:
    """One of them."""
    return _base(state) if model == state.base_name else _adapter(state.registry.get(model), state)


def _base(state: ServerState) -> dict[str, Any]:
    return _model(state.base_name, created=state.created, root=state.base_name, parent=None)


def _adapter(adapter: Adapter, state: ServerState) -> dict[str, Any]:
    return _model(adapter.name, created=adapter.created, root=adapter.path.name, parent=state.base_name)


def _model(name: str, *, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "quickchange",
        "root": root,
        "parent": parent,
    }
