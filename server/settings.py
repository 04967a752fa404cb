"""Every setting of the server in one typed object: environment (``QUICKCHANGE_*``), ``.env``, or flags."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from base_files.locate import EMBEDDED_BASE


class Settings(BaseSettings):
    """What an operator can choose. Built once in ``__main__`` and handed down as values."""

    model_config = SettingsConfigDict(
        env_prefix="QUICKCHANGE_", env_file=".env", env_file_encoding="utf-8", extra="ignore"
    )

    base_model: str = Field(
        EMBEDDED_BASE,
        description="The frozen base: 'micro' (embedded), a folder, or a hub id. The trainer reads it too.",
    )
    adapters_dir: Path = Field(
        Path("adapters"), description="The folder whose sub-folders are adapters; watched while the server runs."
    )
    adapter_roots: Annotated[tuple[Path, ...] | None, NoDecode] = Field(
        None,
        description="Folders, separated by ':', into which links in the adapter folder are followed; without it, the "
        "adapter folder itself and the hub's cache; empty, none.",
    )
    demo_adapters: bool = Field(
        True, description="Also serve the adapters that come with the package, where the base is the embedded one."
    )
    served_model_name: str | None = Field(
        None, description="The base's name in the API; without it, the last part of base_model."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the base lives; auto takes an accelerator if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the base; auto is bfloat16 where it is native and faster, else float32."
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 makes the base's linears and embedding 8-bit integers at start: faster on a CPU, in less "
        "memory than bfloat16, for a little accuracy.",
    )
    threads: int | None = Field(
        None, ge=1, description="Threads for matrix products; without it, the cores this process may use."
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Longest sequence in tokens, prompt and completion together; without it, the base's own.",
    )
    max_num_seqs: int = Field(32, ge=1, le=1024, description="Sequences computed at once.")
    max_num_batched_tokens: int = Field(
        512, ge=1, description="Rows of one step: running sequences first, then chunks of prompts up to this many."
    )
    max_prefill_tokens: int = Field(
        128, ge=1, description="Rows of prompts in a step in which others are being answered: they wait no longer."
    )
    kv_memory: int = Field(
        2_147_483_648,
        ge=1,
        description="Bytes of memory for keys and values, of running sequences and of those kept for reuse.",
    )
    prefix_caching: bool = Field(
        True,
        description="Reuse what was computed for an earlier prompt that begins alike, of the same key and adapter.",
    )
    speculation: Literal["ngram", "none"] = Field(
        "ngram",
        description="Draft tokens from what followed the last ones before, and let the model judge several in a step.",
    )
    max_draft_tokens: int = Field(12, ge=1, le=64, description="Tokens drafted for a sequence in a step at most.")
    max_queued_seqs: int = Field(256, ge=0, description="Sequences that may wait for a slot before requests get a 503.")
    max_lora_rank: int = Field(256, ge=1, description="Adapters of a larger rank are refused.")
    max_adapter_bytes: int = Field(
        1_073_741_824, ge=1, description="Adapters whose weights file is larger are refused."
    )
    adapter_memory: int = Field(
        2_147_483_648,
        ge=1,
        description="Bytes of memory for adapters' weights, and copies of those computed side by side; what was used "
        "longest ago makes room.",
    )
    state_dir: Path | None = Field(
        None,
        description="Where versions of adapters and pins are kept; without it, versions live in memory only.",
    )
    keep_versions: int = Field(3, ge=1, le=1000, description="Versions kept of each adapter in the state directory.")
    removal_grace: float = Field(
        2.0, ge=0, description="Seconds that an adapter's folder may be missing before its name is gone."
    )
    trust_chat_templates: bool = Field(
        False,
        description="Use chat templates that adapters bring from other trainers or a hub (in a sandbox).",
    )
    trusted_templates: str | None = Field(
        None,
        description="Adapters whose chat templates are used without that: their names, with commas between them.",
    )
    admin_key: SecretStr | None = Field(
        None,
        description="Key for loading, pinning and deleting adapters over HTTP; without it, that is off.",
    )
    default_max_tokens: int = Field(
        512,
        ge=1,
        description="Length of a completion when neither request nor adapter says; cut to what the context leaves.",
    )
    scan_interval: float = Field(
        1.0, gt=0, description="Seconds in which nothing in an adapter's folder may change before it is read."
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, description="Seconds that running requests get to finish when the server stops."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @field_validator("base_model")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("base_model is empty: use 'micro', a folder or a hub id")
        return value

    @field_validator("admin_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("a key must have 16 characters or more")
        return value

    @field_validator("adapter_roots", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Folders from one text: a JSON list, or separated by ``:``, or by ``,`` as a flag given twice."""
        if not isinstance(value, str):
            return value
        found = _json_list(value) if value.lstrip().startswith("[") else re.split(r"[:,]", value)
        return [Path(one.strip()).expanduser() for one in found if one.strip()]

    @property
    def trusted_names(self) -> frozenset[str]:
        return frozenset(name.strip() for name in (self.trusted_templates or "").split(",") if name.strip())

    @property
    def base_name(self) -> str:
        if self.served_model_name:
            return self.served_model_name
        folder = Path(self.base_model).expanduser()
        return folder.resolve().name if folder.is_dir() else folder.name


def _json_list(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError("write folders separated by ':', or a JSON list of texts")
    return found
