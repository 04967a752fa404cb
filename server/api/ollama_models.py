"""Ollama's ``/api/tags``, ``/api/show``, ``/api/ps`` and ``/api/version``: what is served, in its form."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fastapi import APIRouter, Request

from server.adapters.content.generation_defaults import GenerationDefaults
from server.api.formats.ollama import timestamp
from server.api.formats.wire import Json
from server.api.generation import overlay
from server.api.ignored_fields import note_ignored_fields
from server.api.models import find_model, served_models
from server.api.protocol.ollama import OllamaShowRequest
from server.api.state import ServerState, State, UsableAdapters
from server.errors import InvalidRequest
from server.text.reasoning import reasoning_format

router = APIRouter()

OLLAMA_VERSION = "0.12.6"
"""The version of Ollama's API that this server answers as; some clients refuse an older one."""
_NUMBER_FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "INT8"}
_NEVER = "9999-12-31T00:00:00Z"


@router.get("/api/version")
async def ollama_version(state: State) -> dict[str, str]:
    """The version of Ollama's API, and this server's own."""
    return {"version": OLLAMA_VERSION, "quickchange": state.version}


@router.get("/api/tags")
async def ollama_tags(state: State, may_use: UsableAdapters) -> dict[str, Any]:
    """The models: the base, its adapters and aliases."""
    return {"models": [_listed(model, state) for model in served_models(state, may_use)]}


@router.get("/api/ps")
async def ollama_ps(state: State, may_use: UsableAdapters) -> dict[str, Any]:
    """The models in memory: the base, and the adapters that are loaded."""
    loaded = [model for model in served_models(state, may_use) if _is_loaded(model, state)]
    more = {"expires_at": _NEVER, "size_vram": 0, "context_length": state.engine.max_model_len}
    return {"models": [_listed(model, state) | more for model in loaded]}


@router.post("/api/show")
async def ollama_show(body: OllamaShowRequest, http: Request, state: State, may_use: UsableAdapters) -> dict[str, Any]:
    """One model: its chat template, parameters and capabilities."""
    await note_ignored_fields(body, http, state)
    name = body.model or body.name
    if not name:
        raise InvalidRequest("Missing required parameter: 'model'.", param="model", code="missing_required_parameter")
    return _shown(await find_model(name, state, may_use), state)


def _is_loaded(model: Json, state: ServerState) -> bool:
    return model["id"] == state.base_name or model.get("state") == "resident"


def _listed(model: Json, state: ServerState) -> Json:
    entry = state.adapters.registry.find(model["id"]) or state.adapters.registry.find(model["root"])
    return {
        "name": model["id"],
        "model": model["id"],
        "modified_at": timestamp(model["created"]),
        "size": state.base_size.num_bytes if entry is None else entry.listing.plan.num_bytes,
        "digest": model.get("digest") or hashlib.sha256(f"{state.computation}:{model['id']}".encode()).hexdigest(),
        "details": _details(model, state),
    }


def _details(model: Json, state: ServerState) -> Json:
    family = state.base_name
    return {
        "parent_model": model["parent"] or "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{state.base_size.num_parameters / 1e6:.1f}M",
        "quantization_level": _NUMBER_FORMATS[state.base_size.number_format],
    }


def _shown(model: Json, state: ServerState) -> Json:
    entry = state.adapters.registry.find(model["id"]) or state.adapters.registry.find(model["root"])
    defaults = state.base_defaults if entry is None else overlay(entry.listing.defaults, state.base_defaults)
    template = defaults.chat_template or state.prompts.chat_template or ""
    capabilities = ["completion", "tools"] + (["thinking"] if reasoning_format(template) is not None else [])
    return {
        "modelfile": f"FROM {state.base_name}\n",
        "parameters": _parameters(defaults, state),
        "template": template,
        "system": defaults.system_prompt or "",
        "details": _details(model, state),
        "model_info": {
            "general.architecture": "quickchange",
            "general.basename": state.base_name,
            "general.parameter_count": state.base_size.num_parameters,
            "quickchange.context_length": state.engine.max_model_len,
            "quickchange.embedding_length": state.base_size.hidden_size,
        },
        "capabilities": capabilities,
        "modified_at": timestamp(model["created"]),
    }


def _parameters(defaults: GenerationDefaults, state: ServerState) -> str:
    """The generation defaults as the lines of a Modelfile, without ``PARAMETER``."""
    values = {
        "num_ctx": state.engine.max_model_len,
        "num_predict": defaults.max_tokens,
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
    }
    lines = [f"{name:30} {value}" for name, value in values.items() if value is not None]
    return "\n".join([*lines, *(f"{'stop':30} {json.dumps(text)}" for text in defaults.stop)])
