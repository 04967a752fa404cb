"""The bodies of Ollama's API.

Bounds of sampling parameters are those of a chat request, which a body is translated to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from server.api.protocol.model import Integer, RequestModel, Text


class OllamaOptions(RequestModel):
    """Sampling parameters. Those of Ollama's runner, such as ``num_ctx``, belong to this server's start."""

    ignored = frozenset(
        {
            "draft_num_predict",
            "embedding_only",
            "f16_kv",
            "logits_all",
            "low_vram",
            "main_gpu",
            "mirostat_eta",
            "mirostat_tau",
            "num_batch",
            "num_ctx",
            "num_gpu",
            "num_keep",
            "num_thread",
            "numa",
            "penalize_newline",
            "repeat_last_n",
            "use_mlock",
            "use_mmap",
            "vocab_only",
        }
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"mirostat": (0,), "tfs_z": (1,), "typical_p": (1,)}

    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: Text | list[Text] | None = None
    num_predict: Integer | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class OllamaFunction(RequestModel):
    """The function of a call; its arguments are an object."""

    ignored = frozenset({"description", "index"})

    name: Text
    arguments: dict[str, Any] = Field(default_factory=dict)


class OllamaCall(RequestModel):
    """A call that the model made in an earlier turn."""

    ignored = frozenset({"type"})

    id: Text | None = None
    function: OllamaFunction


class OllamaMessage(RequestModel):
    """A turn of the conversation."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"images": ([],)}

    role: Literal["system", "user", "assistant", "tool"]
    content: Text = ""
    thinking: Text | None = None
    tool_calls: list[OllamaCall] = Field(default_factory=list)
    tool_name: Text | None = None
    name: Text | None = None
    tool_call_id: Text | None = None


class OllamaRequest(RequestModel):
    """What chat and generate share. ``stream`` is on unless it is false."""

    ignored = frozenset({"keep_alive", "shift", "truncate"})

    model: Text
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions = Field(default_factory=OllamaOptions)
    think: bool | Text | None = None
    logprobs: bool = False
    top_logprobs: Integer | None = None


def _function_tool(value: object) -> object:
    return {"type": "function", **value} if isinstance(value, dict) else value


class OllamaChatRequest(OllamaRequest):
    """``POST /api/chat``. Without messages it loads the model."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: list[Annotated[dict[str, Any], BeforeValidator(_function_tool)]] = Field(default_factory=list)


class OllamaGenerateRequest(OllamaRequest):
    """``POST /api/generate``. Without a prompt it loads the model."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "context": ([],),
        "images": ([],),
        "suffix": ("",),
        "template": ("",),
    }

    prompt: Text = ""
    system: Text = ""
    raw: bool = False


class OllamaEmbedRequest(RequestModel):
    """``POST /api/embed``."""

    ignored = frozenset({"keep_alive", "options"})

    model: Text
    input: Text | list[Text]
    truncate: bool = True
    dimensions: Integer | None = Field(None, ge=1, lt=2**31)


class OllamaEmbeddingsRequest(RequestModel):
    """``POST /api/embeddings``, the older form."""

    ignored = frozenset({"keep_alive", "options"})

    model: Text
    prompt: Text


class OllamaShowRequest(RequestModel):
    """``POST /api/show``; ``name`` is the older form of ``model``."""

    ignored = frozenset({"options", "system", "template", "verbose"})

    model: Text | None = None
    name: Text | None = None
