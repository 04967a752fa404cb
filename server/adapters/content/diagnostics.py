"""All that is wrong with an adapter folder, where the server stops at the first thing, and what can be told of it.

``read_manifest`` has the last word on whether a folder is served; only a folder that is not is looked at more closely.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapter_format.files import CONFIG_FILE, SIDECAR_FILE, SOURCE_FILE, TOKENS_FILE, WEIGHTS_FILE
from adapter_format.sidecar import Sidecar, parse_sidecar
from base_files.safetensors_header import FLOAT_DTYPES, TensorEntry
from server.adapters.content.config_fields import FIELDS, READ
from server.adapters.content.folder import (
    MAX_JSON_BYTES,
    OPTIONAL_FILES,
    UNREAD_FILES,
    AdapterFiles,
    read_file_at,
    read_tokens_at,
)
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import (
    AdapterPolicy,
    Manifest,
    check_tokenizer,
    check_values,
    generation_defaults_of,
    parse_json,
    parse_optional,
    read_manifest,
    weights_header,
)
from server.adapters.content.module_plan import LowRank
from server.adapters.content.peft_config import LoRAConfig, parse_peft_config
from server.adapters.content.plan import AdapterPlan, PlanError, make_plan
from server.adapters.content.safe_open import Folder, PermissionDenied
from server.adapters.content.signature import BaseSignature, base_check
from server.errors import AdapterRejected

CheckDefaults = Callable[[GenerationDefaults], None]


@dataclass
class DiagnosticReport:
    """What was found. A folder without ``problems`` has a ``manifest``; of another, what could be read is here.

    ``said`` is PEFT's config as it stands in the file, whatever it says, and ``source`` the note of a hub.
    """

    path: Path
    name: str
    problems: list[str] = field(default_factory=list)
    said: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    config: LoRAConfig | None = None
    sidecar: Sidecar | None = None
    defaults: GenerationDefaults | None = None
    plan: AdapterPlan | None = None
    manifest: Manifest | None = None

    @contextlib.contextmanager
    def noting(self, what: str = "") -> Iterator[None]:
        """Note what goes wrong in the block as problems, and go on behind it."""
        found: list[str] = []
        try:
            yield
        except PlanError as error:
            found = error.problems
        except ValueError as error:
            found = [f"{what}{error}"]
        except OSError as error:
            found = [f"cannot be read: {error.strerror}"]
        self.problems += [problem for problem in found if problem not in self.problems]


def diagnose(
    path: Path,
    base: BaseSignature,
    policy: AdapterPolicy,
    *,
    name: str | None = None,
    check_defaults: CheckDefaults = lambda defaults: None,
) -> DiagnosticReport:
    """Read and judge a folder. ``check_defaults`` raises ``ValueError`` for what cannot be honoured."""
    found = DiagnosticReport(path, name or path.name)
    try:
        manifest = read_manifest(path, base, policy, name=found.name)
    except OSError as error:
        found.problems.append(f"cannot be read just now: {error.strerror}")
        return found
    except AdapterRejected as error:
        _look_closer(found, base, policy, check_defaults)
        if not any(problem in error.reason for problem in found.problems):
            found.problems.insert(0, error.reason)
        return found
    with found.noting():
        check_defaults(manifest.defaults)
    found.said, found.source = json.loads(manifest.files.config), _object(manifest.files.others, SOURCE_FILE)
    found.config, found.sidecar, found.defaults = manifest.config, manifest.sidecar, manifest.defaults
    found.plan, found.manifest = manifest.plan, manifest
    return found


def _look_closer(
    found: DiagnosticReport, base: BaseSignature, policy: AdapterPolicy, check_defaults: CheckDefaults
) -> None:
    """Judge each part by itself, as far as the parts before it allow."""
    files = _read_parts(found, policy)
    found.source = _object(files.others, SOURCE_FILE)
    if files.config:
        _judge_config(found, files.config)
    with found.noting():
        found.sidecar = parse_optional(files, SIDECAR_FILE, parse_sidecar)
        base_check(found.sidecar, base)
    with found.noting():
        check_tokenizer(files, base)
    with found.noting():
        generation_defaults_of(found.name, files, found.sidecar, base, policy)
    with contextlib.suppress(ValueError):
        found.defaults = generation_defaults_of(
            found.name, files, found.sidecar, base, replace(policy, trust_chat_templates=True)
        )
    if found.defaults is not None:
        with found.noting():
            check_defaults(found.defaults)
    if files.weights:
        _judge_weights(found, files.weights, base, policy)


def _read_parts(found: DiagnosticReport, policy: AdapterPolicy) -> AdapterFiles:
    """The files that can be read; the others are empty or left out."""
    parts: dict[str, bytes] = {}
    with found.noting(), Folder.opened(found.path, policy.roots) as folder:
        for name, limit in {CONFIG_FILE: MAX_JSON_BYTES, WEIGHTS_FILE: policy.max_bytes, **OPTIONAL_FILES}.items():
            with found.noting():
                part = _read_part(folder, name, limit)
                parts |= {} if part is None else {name: part}
        with found.noting():
            parts[TOKENS_FILE] = read_tokens_at(folder, {}, whole=True)
    config, weights = parts.pop(CONFIG_FILE, b""), parts.pop(WEIGHTS_FILE, b"")
    return AdapterFiles(config, weights, len(weights), parts, 0, tokens=parts.pop(TOKENS_FILE, b""))


def _read_part(folder: Folder, name: str, limit: int) -> bytes | None:
    """A file's bytes; None where there is none, or an adapter is served without it."""
    try:
        part = read_file_at(folder, name, limit)
    except PermissionDenied:
        if name in UNREAD_FILES:
            return None
        raise
    return None if part is None else part[0]


def _judge_config(found: DiagnosticReport, data: bytes) -> None:
    """Every field by itself, then all together but for those that were refused and say nothing of the tensors."""
    with found.noting():
        said = parse_json(data, CONFIG_FILE)
        found.said = said if isinstance(said, dict) else {}
        wrong = {name: problem for name, value in found.said.items() if (problem := _field_problem(name, value))}
        found.problems += wrong.values()
        if not any(FIELDS.get(name) == READ for name in wrong):
            rest = {name: value for name, value in found.said.items() if name not in wrong}
            found.config = parse_peft_config(rest if wrong else said)


def _field_problem(name: str, value: Any) -> str | None:
    try:
        parse_peft_config({"peft_type": "LORA", name: value})
    except ValueError as error:
        return str(error)
    return None


def _judge_weights(found: DiagnosticReport, data: bytes, base: BaseSignature, policy: AdapterPolicy) -> None:
    """The container, the values, and, where the config says what they mean, the tensors."""
    entries: Mapping[str, TensorEntry] = {}
    with found.noting():
        entries = weights_header(data, len(data))
    with found.noting():
        check_values(data, {name: entry for name, entry in entries.items() if entry.dtype in FLOAT_DTYPES})
    if not entries or found.config is None:
        return
    with found.noting():
        found.plan = make_plan(entries, found.config, base, max_rank=policy.max_rank)
        if found.plan.composable and not any(_moves(data, part.low_rank) for part in found.plan.parts.values()):
            raise ValueError("all its deltas are zero, so it would change nothing: was it trained?")


def _moves(data: bytes, delta: LowRank | None) -> bool:
    return delta is not None and all(data[one.begin : one.end].strip(b"\0") for one in (delta.a, delta.b))


def _object(files: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    """A file's JSON object; empty where there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(files.get(name, b""))
        return found if isinstance(found, dict) else {}
    return {}
