"""Admin endpoints for adapters: vLLM's load and unload, OpenAI's ``DELETE``, pins and roll-backs.

They need a key of scope admin, without which they are off.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from server.adapters.operator import AdapterOperator
from server.api.auth.principal import AccessScope
from server.api.state import State
from server.errors import AdminOff, InsufficientPermissions

router = APIRouter()


async def _operator(request: Request, state: State) -> AdapterOperator:
    """Check the scope again, whatever path led here. Raises ``AdminOff`` or ``InsufficientPermissions``."""
    if state.operator is None:
        raise AdminOff
    if not request.state.principal.allows(AccessScope.ADMIN):
        raise InsufficientPermissions(AccessScope.ADMIN)
    return state.operator


Operator = Annotated[AdapterOperator, Depends(_operator)]


ExpectedDigest = Annotated[str | None, Field(pattern=r"^[0-9a-f]{4,64}$")]
"""The first digits of a version's digest."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class LoadRequest(_Body):
    """vLLM's body; ``lora_path`` is inside the adapter folder. With ``expected_digest`` only this version is loaded."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    expected_digest: ExpectedDigest = None


class UnloadRequest(_Body):
    """vLLM's body; with ``expected_digest`` only this version is unloaded."""

    lora_name: str = Field(min_length=1, max_length=128)
    expected_digest: ExpectedDigest = None


class PinRequest(_Body):
    """The version to pin; without it, the adapter is pinned in memory."""

    version: str | None = Field(None, pattern=r"^[0-9a-f]{4,64}$")


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(operator: Operator, body: LoadRequest) -> dict[str, Any]:
    """Load a folder and serve it under a name."""
    adapter = await operator.load(
        body.lora_name, body.lora_path, in_place=body.load_inplace, expected=body.expected_digest
    )
    return {"message": f"The adapter '{body.lora_name}' is loaded.", "adapter": adapter.label}


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(operator: Operator, body: UnloadRequest) -> dict[str, Any]:
    """Stop serving a name; its running requests finish."""
    await operator.unload(body.lora_name, expected=body.expected_digest)
    return {"message": f"The adapter '{body.lora_name}' is unloaded."}


@router.delete("/v1/models/{model}")
async def delete_model(operator: Operator, model: str) -> dict[str, Any]:
    """Delete an adapter's folder and its kept versions."""
    await operator.delete(model)
    return {"id": model, "object": "model", "deleted": True}


@router.post("/v1/models/{model}/pin")
async def pin(operator: Operator, model: str, body: PinRequest) -> dict[str, Any]:
    """Pin a name to a version, or pin its adapter in memory."""
    adapter = await operator.pin(model, body.version)
    return {"id": model, "pinned": "in memory" if adapter is None else adapter.label}


@router.post("/v1/models/{model}/unpin")
async def unpin(operator: Operator, model: str) -> dict[str, Any]:
    """Remove the pins of a name, which then follows its folder again."""
    await operator.unpin(model)
    return {"id": model, "pinned": None}


@router.post("/v1/models/{model}/rollback")
async def rollback(operator: Operator, model: str) -> dict[str, Any]:
    """Pin a name to the version before the current one."""
    adapter = await operator.rollback(model)
    return {"id": model, "pinned": adapter.label}
