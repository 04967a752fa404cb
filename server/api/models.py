"""``/v1/models``: the base, its adapters and aliases; ``root`` and ``parent`` tell them apart, as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fastapi import APIRouter, Request

from adapter_format.sidecar import Sidecar
from server.adapters.aliases import Alias
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.model_names import MayUse
from server.adapters.registry import Adapter, Entry
from server.adapters.versions import DIGITS
from server.api.formats.anthropic import ANTHROPIC_VERSION, anthropic_model, anthropic_models
from server.api.state import ServerState, State, UsableAdapters
from server.errors import ModelNotFound, without_paths

router = APIRouter()


@router.get("/v1/models")
async def list_models(http: Request, state: State, may_use: UsableAdapters) -> dict[str, Any]:
    """The base, then the adapters by name, then the aliases."""
    models = served_models(state, may_use)
    if ANTHROPIC_VERSION in http.headers:
        return anthropic_models(models)
    return {"object": "list", "data": models}


def served_models(state: ServerState, may_use: MayUse) -> list[dict[str, Any]]:
    """The models of a key, as objects of OpenAI's API."""
    adapters = [_adapter(entry, state) for entry in state.adapters.registry if may_use(entry.name)]
    aliases = [_alias(alias, state) for alias in state.adapters.names.visible_aliases(may_use)]
    return [_base(state), *adapters, *aliases]


@router.get("/v1/models/{model:path}")
async def get_model(model: str, http: Request, state: State, may_use: UsableAdapters) -> dict[str, Any]:
    """One model by any text that a request may give as ``model``; an adapter with all details."""
    found = await find_model(model, state, may_use)
    return anthropic_model(found) if ANTHROPIC_VERSION in http.headers else found


async def find_model(model: str, state: ServerState, may_use: MayUse) -> dict[str, Any]:
    """As ``get_model``. Raises ``ModelNotFound``."""
    names = state.adapters.names
    try:
        resolved = names.resolve(model, may_use=may_use)
    except ModelNotFound:
        raise state.adapters.not_found(model, may_use) from None
    name = resolved.name or ""
    entry, alias = state.adapters.registry.find(name), names.aliases.get(name)
    if entry is not None and resolved.refs:
        return _adapter(entry, state) | _details(entry, state)
    if alias is not None:
        return _alias(alias, state)
    if not resolved.refs:
        return _base(state)
    return _composition(model, await state.adapters.find(resolved.refs, may_use), state)


def state_of(adapter: Adapter | None, state: ServerState) -> str:
    """``unverified`` until its files are hashed, then ``ready``, ``loading`` or ``resident``."""
    if adapter is None:
        return "unverified"
    return state.adapters.cache.state(adapter.weights_digest) or "ready"


def _base(state: ServerState) -> dict[str, Any]:
    return _model(state.base_name, state, created=state.created, root=state.base_name, parent=None)


def _adapter(entry: Entry, state: ServerState) -> dict[str, Any]:
    listing, served = entry.listing, entry.served
    model = _model(entry.name, state, created=listing.created, root=listing.path.name, parent=state.base_name)
    verdict = None if listing.sidecar is None else listing.sidecar.verdict
    return model | {
        "digest": None if served is None else served.version_digest,
        "state": state_of(served, state),
        "base_check": listing.base_check,
        "verdict": None if verdict is None else verdict.status,
    }


def _alias(alias: Alias, state: ServerState) -> dict[str, Any]:
    targets = {target.model: target.share for target in alias.targets}
    model = _model(alias.name, state, created=state.created, root=next(iter(targets)), parent=state.base_name)
    return model | {"alias_of": targets}


def _composition(text: str, adapters: Sequence[Adapter], state: ServerState) -> dict[str, Any]:
    """A version, a weight, or several adapters, as a request names them."""
    created = max(adapter.listing.created for adapter in adapters)
    model = _model(text, state, created=created, root=adapters[0].listing.path.name, parent=state.base_name)
    return model | {"adapters": [adapter.label for adapter in adapters]}


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


def _model(name: str, state: ServerState, *, created: int, root: str, parent: str | None) -> dict[str, Any]:
    """OpenAI's fields and those that vLLM adds; the context is the base's, so it is the same for all."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "quickchange",
        "root": root,
        "parent": parent,
        "max_model_len": state.engine.max_model_len,
        "context_length": state.engine.max_model_len,
    }
