"""Every problem of an adapter folder (the server stops at the first one), and what could be read of it.

``read_manifest`` decides whether a folder is served. Only a folder that it rejects is examined part by part.
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
from server.adapters.content.base_check import base_check
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
from server.adapters.content.signature import BaseSignature
from server.errors import AdapterRejected

CheckDefaults = Callable[[GenerationDefaults], None]


@dataclass
class DiagnosticReport:
    """The result of ``diagnose``: ``manifest`` if there are no ``problems``, the rest as far as it could be read.

    ``other_base`` names the base that the adapter is for if it is not this one; that is the only problem told then.
    ``raw_config`` is PEFT's config as it stands in the file, unchecked; ``source`` the note of a hub's repository.
    """

    path: Path
    name: str
    problems: list[str] = field(default_factory=list)
    other_base: str | None = None
    raw_config: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    config: LoRAConfig | None = None
    sidecar: Sidecar | None = None
    defaults: GenerationDefaults | None = None
    plan: AdapterPlan | None = None
    manifest: Manifest | None = None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Add the error that ends the block, if any, to ``problems``."""
        problems: list[str] = []
        try:
            yield
        except PlanError as error:
            problems = error.problems
        except ValueError as error:
            problems = [str(error)]
        except OSError as error:
            problems = [f"cannot be read: {error.strerror}"]
        self.problems += [problem for problem in problems if problem not in self.problems]


def diagnose(
    path: Path,
    base: BaseSignature,
    policy: AdapterPolicy,
    *,
    name: str | None = None,
    check_defaults: CheckDefaults = lambda defaults: None,
) -> DiagnosticReport:
    """Read and check a folder. ``check_defaults`` raises ``ValueError`` for unsupported generation defaults."""
    report = DiagnosticReport(path, name or path.name)
    try:
        manifest = read_manifest(path, base, policy, name=report.name)
    except OSError as error:
        report.problems.append(f"cannot be read just now: {error.strerror}")
        return report
    except AdapterRejected as error:
        _check_parts(report, base, policy, check_defaults)
        if error.other_base is not None:
            report.other_base, report.problems = error.other_base, [error.reason]
        elif not any(problem in error.reason for problem in report.problems):
            report.problems.insert(0, error.reason)
        return report
    with report.collecting():
        check_defaults(manifest.defaults)
    report.raw_config = json.loads(manifest.files.config)
    report.source = _object(manifest.files.others, SOURCE_FILE)
    report.config, report.sidecar, report.defaults = manifest.config, manifest.sidecar, manifest.defaults
    report.plan, report.manifest = manifest.plan, manifest
    return report


def _check_parts(
    report: DiagnosticReport, base: BaseSignature, policy: AdapterPolicy, check_defaults: CheckDefaults
) -> None:
    """Check each part separately, as far as the parts that it depends on allow."""
    files = _read_parts(report, policy)
    report.source = _object(files.others, SOURCE_FILE)
    if files.config:
        _check_config(report, files.config)
    with report.collecting():
        report.sidecar = parse_optional(files, SIDECAR_FILE, parse_sidecar)
        base_check(report.sidecar, base)
    with report.collecting():
        check_tokenizer(files, base)
    with report.collecting():
        generation_defaults_of(report.name, files, report.sidecar, base, policy)
    with contextlib.suppress(ValueError):
        trusting = replace(policy, trust_chat_templates=True)
        report.defaults = generation_defaults_of(report.name, files, report.sidecar, base, trusting)
    if report.defaults is not None:
        with report.collecting():
            check_defaults(report.defaults)
    if files.weights:
        _check_weights(report, files.weights, base, policy)


def _read_parts(report: DiagnosticReport, policy: AdapterPolicy) -> AdapterFiles:
    """The readable files; the others are empty or left out."""
    parts: dict[str, bytes] = {}
    with report.collecting(), Folder.opened(report.path, policy.roots) as folder:
        for name, limit in {CONFIG_FILE: MAX_JSON_BYTES, WEIGHTS_FILE: policy.max_bytes, **OPTIONAL_FILES}.items():
            with report.collecting():
                part = _read_part(folder, name, limit)
                if part is not None:
                    parts[name] = part
        with report.collecting():
            parts[TOKENS_FILE] = read_tokens_at(folder, {}, whole=True)
    config, weights = parts.pop(CONFIG_FILE, b""), parts.pop(WEIGHTS_FILE, b"")
    return AdapterFiles(config, weights, len(weights), parts, 0, tokens=parts.pop(TOKENS_FILE, b""))


def _read_part(folder: Folder, name: str, limit: int) -> bytes | None:
    """A file's bytes; None for a missing file, and for an unreadable one that the adapter is served without."""
    try:
        part = read_file_at(folder, name, limit)
    except PermissionDenied:
        if name in UNREAD_FILES:
            return None
        raise
    return None if part is None else part[0]


def _check_config(report: DiagnosticReport, data: bytes) -> None:
    """Check each field alone, then all together without the refused ones, unless one of these describes the tensors."""
    with report.collecting():
        config = parse_json(data, CONFIG_FILE)
        report.raw_config = config if isinstance(config, dict) else {}
        problems = {name: _field_problem(name, value) for name, value in report.raw_config.items()}
        refused = {name: problem for name, problem in problems.items() if problem is not None}
        report.problems += refused.values()
        if not any(FIELDS.get(name) == READ for name in refused):
            accepted = {name: value for name, value in report.raw_config.items() if name not in refused}
            report.config = parse_peft_config(accepted if refused else config)


def _field_problem(name: str, value: Any) -> str | None:
    try:
        parse_peft_config({"peft_type": "LORA", name: value})
    except ValueError as error:
        return str(error)
    return None


def _check_weights(report: DiagnosticReport, data: bytes, base: BaseSignature, policy: AdapterPolicy) -> None:
    """Check the container, the values and, if the config could be read, the tensors."""
    entries: Mapping[str, TensorEntry] = {}
    with report.collecting():
        entries = weights_header(data, len(data))
    with report.collecting():
        check_values(data, {name: entry for name, entry in entries.items() if entry.dtype in FLOAT_DTYPES})
    if not entries or report.config is None:
        return
    with report.collecting():
        plan = report.plan = make_plan(entries, report.config, base, max_rank=policy.max_rank)
        if plan.composable and not any(_is_nonzero(data, part.low_rank) for part in plan.parts.values()):
            raise ValueError("all its deltas are zero, so it would change nothing: was it trained?")


def _is_nonzero(data: bytes, delta: LowRank | None) -> bool:
    return delta is not None and all(data[entry.begin : entry.end].strip(b"\0") for entry in (delta.a, delta.b))


def _object(files: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    """A file's JSON object; empty for a missing file or any other content."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(files.get(name, b""))
        return content if isinstance(content, dict) else {}
    return {}
