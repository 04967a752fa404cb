"""``/v1/models``: the base, its adapters and aliases; ``root`` and ``parent`` tell them apart, as in vLLM."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fastapi import APIRouter

from adapter_format.sidecar import Sidecar
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.registry import Adapter, Entry
from server.adapters.versions import DIGITS
from server.api.state import ServerState, State
from server.errors import without_paths

router = APIRouter()


@router.get("/v1/models")
async def list_models(state: State) -> dict[str, Any]:
    """The base, then the adapters by name, then the aliases."""
    adapters = [_adapter(entry, state) for entry in state.adapters.registry]
    aliases = [_alias(name, state) for name in sorted(state.adapters.aliases)]
    shown_aliases = [alias for alias in aliases if alias is not None]
    return {"object": "list", "data": [_base(state), *adapters, *shown_aliases]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, state: State) -> dict[str, Any]:
    """One model; an adapter with all details."""
    if model == state.base_name:
        return _base(state)
    if model in state.adapters.registry:
        entry = state.adapters.registry.get(model)
        return _adapter(entry, state) | _details(entry, state)
    alias = _alias(model, state)
    if alias is not None:
        return alias
    raise state.adapters.not_found(model)


def state_of(adapter: Adapter | None, state: ServerState) -> str:
    """``unverified`` until its files are hashed, then ``ready``, ``loading`` or ``resident``."""
    if adapter is None:
        return "unverified"
    return state.adapters.cache.state(adapter.weights_digest) or "ready"


def _base(state: ServerState) -> dict[str, Any]:
    return _model(state.base_name, created=state.created, root=state.base_name, parent=None)


def _adapter(entry: Entry, state: ServerState) -> dict[str, Any]:
    model = _model(entry.name, created=entry.listing.created, root=entry.listing.path.name, parent=state.base_name)
    served, sidecar = entry.served, entry.listing.sidecar
    verdict = None if sidecar is None else sidecar.verdict
    return model | {
        "digest": None if served is None else served.version_digest,
        "state": state_of(served, state),
        "base_check": entry.listing.base_check,
        "verdict": None if verdict is None else verdict.status,
    }


def _alias(name: str, state: ServerState) -> dict[str, Any] | None:
    """An alias; None if there is none, or an adapter or the base has its name."""
    alias = state.adapters.aliases.get(name)
    if alias is None or name in state.adapters.registry or name == state.base_name:
        return None
    targets = {target.model: target.share for target in alias.targets}
    return _model(name, created=state.created, root=next(iter(targets)), parent=state.base_name) | {"alias_of": targets}


def _details(entry: Entry, state: ServerState) -> dict[str, Any]:
    served, cache, listing = entry.served, state.adapters.cache, entry.listing
    digest = None if served is None else served.weights_digest
    return {
        "weights_digest": digest,
        "versions": [version.version_digest[:DIGITS] for version in entry.versions],
        "pinned": {"version": entry.pin.version, "resident": entry.pin.resident},
        "refused": None if entry.refused is None else without_paths(entry.refused),
        "unread": {file: without_paths(reason) for file, reason in listing.unread.items()},
        "base_note": listing.base_note,
        "rank": listing.plan.rank,
        "targets": sorted({name.rpartition(".")[2] for name in listing.plan.modules}),
        "num_modules": len(listing.plan.modules),
        "num_bytes": listing.plan.num_bytes if served is None else state.adapters.num_bytes(served),
        "delta_norm": None if digest is None else state.adapters.delta_norm(digest),
        "leases": 0 if digest is None else cache.num_leases(digest),
        "composable": listing.plan.composable,
        "checks": _checks(listing.sidecar),
        "defaults": _shown_defaults(listing.defaults, state.prompts.chat_template),
    }


def _checks(sidecar: Sidecar | None) -> dict[str, Any]:
    """The checks behind the trainer's verdict."""
    return {} if sidecar is None or sidecar.verdict is None else sidecar.verdict.model_dump()["checks"]


def _shown_defaults(defaults: GenerationDefaults, base_template: str | None) -> dict[str, Any]:
    """The generation defaults that an adapter sets; of its chat template only whether it is the base's."""
    shown = {item.name: getattr(defaults, item.name) for item in fields(defaults)}
    if defaults.chat_template is not None:
        shown["chat_template"] = "the base's" if defaults.chat_template == base_template else "its own"
    shown["added_tokens"] = "its own" if defaults.added_tokens else None
    return {name: value for name, value in shown.items() if value not in (None, ())}


def _model(name: str, *, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "quickchange",
        "root": root,
        "parent": parent,
    }
