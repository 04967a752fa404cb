"""The server's settings, from flags, ``QUICKCHANGE_*`` environment variables or ``.env``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE, base_name
from base_files.packaged import PACKAGED_BASES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class Settings(BaseSettings):
    """Settings: flags first, then QUICKCHANGE_* environment variables, then .env."""

    model_config = SettingsConfigDict(
        env_prefix="QUICKCHANGE_", env_file=".env", env_file_encoding="utf-8", extra="ignore"
    )

    base_model: str = Field(
        EMBEDDED_BASE,
        description=f"Base model: {BASE_MODEL_HELP}. The trainer reads it too.",
    )
    adapters_dir: Path = Field(
        Path("adapters"), description="Folder whose sub-folders are adapters; watched while the server runs."
    )
    adapter_roots: Annotated[tuple[Path, ...] | None, NoDecode] = Field(
        None,
        description="Folders, separated by ':', that links in the adapter folder may lead into. Default: the "
        "adapter folder and the hub's cache. Empty: none.",
    )
    demo_adapters: bool = Field(
        True,
        description="Also serve the adapters that come with the package, where the base is one of "
        f"{', '.join(map(repr, (EMBEDDED_BASE, *PACKAGED_BASES)))}.",
    )
    served_model_name: str | None = Field(
        None, description="Name of the base in the API. Default: the last part of base_model, without '.gguf'."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Device of the base; auto takes an accelerator if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of the base; auto is a 16-bit float on an accelerator, bfloat16 on a CPU that "
        "has it where the weights exceed 256 MB, else float32.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 quantizes the base's linear layers and embedding at start: faster on a CPU, in less "
        "memory than bfloat16, for a small loss of accuracy.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads for matrix products. Default: the performance cores that it may use, within its quota.",
    )
    cpu: Literal["generic", "avx2", "avxvnni", "avx512vnni", "amx", "dotprod", "i8mm"] | None = Field(
        None,
        description="Instruction set to keep to, where the CPU has it: that of the C kernels and of torch. The trainer "
        "reads it too. Default: the best that the CPU has.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Maximum length of a sequence in tokens, prompt and completion together. Default: the base's own.",
    )
    max_num_seqs: int = Field(32, ge=1, le=1024, description="Maximum number of sequences computed at once.")
    max_num_batched_tokens: int = Field(
        512, ge=1, description="Maximum tokens per step: running sequences first, then chunks of prompts."
    )
    max_prefill_tokens: int = Field(
        128,
        ge=1,
        description="Maximum prompt tokens per step while other requests are decoding. Bounds their "
        "inter-token latency.",
    )
    kv_memory: int = Field(
        2_147_483_648,
        ge=1,
        description="Bytes of memory for keys and values, of running sequences and of cached prefixes.",
    )
    prefix_caching: bool = Field(
        True,
        description="Reuse keys and values of an earlier prompt with the same beginning, key and adapter.",
    )
    speculation: Literal["ngram", "none"] = Field(
        "ngram",
        description="Speculative decoding: ngram drafts tokens from n-grams of the prompt and of earlier "
        "outputs, and verifies them in one step.",
    )
    max_draft_tokens: int = Field(12, ge=1, le=64, description="Maximum tokens drafted for a sequence per step.")
    max_queued_seqs: int = Field(
        256, ge=0, description="Maximum number of sequences that wait for a slot; further requests get a 503."
    )
    queue_timeout: float = Field(
        600.0, gt=0, description="Seconds that a sequence may wait for a slot; then its request gets a 503."
    )
    max_key_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="Maximum share that one API key has of the queue, and of the running sequences while requests of "
        "another key wait; 1 turns it off.",
    )
    max_lora_rank: int = Field(
        256, ge=1, description="Maximum rank of an adapter; adapters of a larger rank are refused."
    )
    max_adapter_bytes: int = Field(
        1_073_741_824, ge=1, description="Maximum size in bytes of an adapter's weights file; larger ones are refused."
    )
    adapter_memory: int = Field(
        2_147_483_648,
        ge=1,
        description="Bytes of memory for adapters' weights and their copies for batched computation; the least "
        "recently used are evicted.",
    )
    state_dir: Path | None = Field(
        None,
        description="Folder for adapter versions and pins. Default: versions are kept in memory only.",
    )
    keep_versions: int = Field(
        3, ge=1, le=1000, description="Number of versions of each adapter kept in the state directory."
    )
    removal_grace: float = Field(
        2.0, ge=0, description="Seconds that an adapter's folder may be missing before its name is removed."
    )
    trust_chat_templates: bool = Field(
        False,
        description="Use chat templates that adapters bring from other trainers or a hub (in a sandbox).",
    )
    trusted_templates: str | None = Field(
        None,
        description="Names of adapters, separated by commas, whose chat templates are used without "
        "trust_chat_templates.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="Key that every request needs, for inference and metrics; of `quickchange chat` too. Better set in "
        "the environment, which other users cannot see.",
    )
    api_keys: Path | None = Field(
        None,
        description="File of API keys with scopes, adapters and limits (docs/security.md); read again at SIGHUP.",
    )
    allow_origin: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="Origins whose web pages may use the API, such as https://app.example.com; repeatable, or "
        "separated by ','. '*': every web page. Default: none.",
    )
    allowed_host: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="Names under which the server answers (Host header), beside localhost; repeatable, or separated "
        "by ','. Default: on loopback localhost only, elsewhere any name.",
    )
    ssl_certfile: Path | None = Field(None, description="Certificate chain for HTTPS, as PEM.")
    ssl_keyfile: Path | None = Field(
        None, description="Private key of the certificate, as PEM; not needed if the file of the certificate has it."
    )
    allow_unauthenticated: bool = Field(
        False,
        description="Start without API keys on an address that other machines can reach.",
    )
    admin_key: SecretStr | None = Field(
        None,
        description="Key for everything, also for loading, pinning and deleting adapters over HTTP. Default: these "
        "endpoints need a key of scope admin.",
    )
    default_max_tokens: int = Field(
        512,
        ge=1,
        description="Maximum tokens of a completion where neither request nor adapter sets one; cut to what "
        "the context leaves.",
    )
    strict_fields: bool = Field(
        False,
        description="Refuse requests with unknown fields, which otherwise have no effect and are named in the "
        "header x-quickchange-ignored.",
    )
    scan_interval: float = Field(
        1.0, gt=0, description="Seconds without a change in an adapter's folder before it is read."
    )
    sse_ping: Literal["comment", "delta", "off"] = Field(
        "comment",
        description="What a stream sends after 15 s without output, so that proxies keep the connection: a comment, "
        "which clients ignore; an empty delta, for what counts data only; or nothing.",
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, description="Seconds that running requests get to finish when the server stops."
    )
    metrics_alias: Literal["vllm"] | None = Field(
        None, description="Export metrics under vLLM's names as well, for gateways and routers that read those."
    )
    otlp_endpoint: str | None = Field(
        None,
        description="URL of an OpenTelemetry collector, such as http://localhost:4318, for a trace span of each "
        "request, without content. Needs the extra otel.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of log messages."
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of log messages.")

    @field_validator("base_model")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(f"base_model is empty: it is {BASE_MODEL_HELP}")
        return value

    @field_validator("admin_key", "api_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("a key must have 16 characters or more")
        if value is not None and not (value.get_secret_value().isascii() and value.get_secret_value().isprintable()):
            raise ValueError("a key must consist of printable ASCII characters, as it is sent in a header")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"https?://[^/\s]", value, re.IGNORECASE):
            raise ValueError("write the collector's URL, such as http://localhost:4318")
        return value

    @field_validator("allow_origin", "allowed_host", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        """Parse names separated by ``,``, which is also what a repeated flag becomes."""
        if not isinstance(value, str):
            return value
        return [name.strip() for name in value.split(",") if name.strip()]

    @field_validator("adapter_roots", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Parse a JSON list, or folders separated by ``:``, or by ``,`` (a flag that is given twice)."""
        if not isinstance(value, str):
            return value
        folders = _json_list(value) if value.lstrip().startswith("[") else re.split(r"[:,]", value)
        return [Path(folder.strip()).expanduser() for folder in folders if folder.strip()]

    @property
    def trusted_names(self) -> frozenset[str]:
        return frozenset(name.strip() for name in (self.trusted_templates or "").split(",") if name.strip())

    @property
    def base_name(self) -> str:
        if self.served_model_name:
            return self.served_model_name
        return Path(base_name(self.base_model)).name

    @property
    def base_names(self) -> tuple[str, ...]:
        """``base_name``, and what else the base is called: its hub id, whole and without the organisation."""
        packaged = PACKAGED_BASES.get(self.base_model)
        hub_id = self.base_model if packaged is None else packaged.hub_id
        is_hub_id = not Path(hub_id).expanduser().exists() and HUB_ID.fullmatch(hub_id)
        return (self.base_name, hub_id, hub_id.rpartition("/")[2]) if is_hub_id else (self.base_name,)


def _json_list(text: str) -> list[str]:
    try:
        folders = json.loads(text)
    except ValueError:
        folders = None
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        raise ValueError("write folders separated by ':', or a JSON list of strings")
    return folders
