"""``quickchange adapters check``: a report on one adapter folder, its problems, and a comparison with PEFT."""

from __future__ import annotations

import contextlib
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_format.files import CONFIG_FILE, SIDECAR_FILE, TOKENS_FILE, WEIGHTS_FILE
from adapter_format.sidecar import Verdict
from base_files.locate import find_base
from base_files.source import BaseSource, num_float_bytes
from server.adapters.content.base_check import base_check
from server.adapters.content.diagnostics import DiagnosticReport
from server.adapters.content.folder import OPTIONAL_FILES, UNREAD_FILES
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import Manifest
from server.adapters.content.module_plan import LowRank
from server.adapters.content.plan import AdapterPlan
from server.adapters.content.signature import BaseSignature
from server.adapters.names import is_name
from server.cli.command_line import command_parser, parse_options, parse_settings, say, say_row
from server.cli.folders import adapter_folders
from server.settings import Settings

if TYPE_CHECKING:
    from server.cli.parity import Answers

DESCRIPTION = """\
Report on one adapter: files, PEFT config, modules that it changes, generation defaults, memory, digests, and every
problem that prevents serving. The base of the settings is loaded on the CPU. If the adapter can be served, two
prompts of 20 tokens are continued by 8 tokens, and the logits of this server's engine are compared with PEFT's.
The exit status is 0 if the adapter can be served and its logits agree with PEFT's."""

MAX_PROBED_BYTES = 8_000_000_000
"""Largest base, in bytes of its weights, for the comparison, which loads the base a second time, in float32."""

Row = tuple[str, str]
_FILES_READ = (CONFIG_FILE, WEIGHTS_FILE, TOKENS_FILE, *OPTIONAL_FILES)
_MOST_FILES, _MOST_CHARS = 40, 160


def main(arguments: Sequence[str]) -> int:
    """Print the report; the exit status is 1 if the adapter is not served or its logits differ from PEFT's."""
    parser = command_parser("adapters check", DESCRIPTION)
    parser.add_argument("adapter", metavar="DIR|NAME", help="any folder, or the name of one in the adapter folders")
    parser.add_argument("--no-probe", action="store_true", help="do not compare with PEFT")
    options, rest = parse_options(parser, arguments, switches=("--no-probe",))
    settings = parse_settings("adapters check", rest)
    folders = adapter_folders(settings)
    path = find_folder(options.adapter, folders)
    if path is None:
        places = " and ".join(str(folder) for folder in folders)
        print(
            f"quickchange: there is no folder {options.adapter} and no adapter of this name in {places}",
            file=sys.stderr,
        )
        return 1
    base_source = find_base(settings.base_model)
    skipped = _why_not_compared(base_source, wanted=not options.no_probe)
    report, answers = _examine(path, settings, compared=skipped is None)
    if report.problems or report.manifest is None:
        return 1
    if answers is None:
        say_row("PEFT parity", f"not compared: {skipped}")
        return 0
    return _compare(base_source, report.manifest, answers)


def find_folder(text: str, folders: Sequence[Path]) -> Path | None:
    """The adapter of this name in the first folder that has it, else the folder at this path, else None."""
    named = [folder / text for folder in folders if is_name(text)]
    return next((path for path in (*named, Path(text)) if path.is_dir()), None)


def _examine(path: Path, settings: Settings, *, compared: bool) -> tuple[DiagnosticReport, Answers | None]:
    """Print the report and, if ``compared``, compute the engine's logits. The base is unloaded at the end."""
    from server.cli.adapter_checker import AdapterChecker  # imports torch, which takes seconds
    from server.cli.parity import answer_here

    with contextlib.closing(AdapterChecker.load(settings, dtype="float32" if compared else settings.dtype)) as checker:
        report, weights = checker.check(path)
        say(f"{path}: {_status(report, served=weights is not None)}")
        rows = report_rows(
            report,
            checker.base.signature,
            base_template=checker.prompts.chat_template,
            template_trusted=settings.trust_chat_templates or report.name in settings.trusted_names,
            delta_norm=None if weights is None else weights.delta_norm,
        )
        for label, text in rows:
            say_row(label, text)
        if weights is None or report.manifest is None or not compared:
            return report, None
        return report, answer_here(checker.base, report.manifest, weights)


def _status(report: DiagnosticReport, *, served: bool) -> str:
    if served:
        return f"served as {report.name}"
    return "NOT SERVED" if report.other_base is None else f"NOT SERVED, for another base: {_short(report.other_base)}"


def _why_not_compared(source: BaseSource, *, wanted: bool) -> str | None:
    if not wanted:
        return "--no-probe was given"
    size = num_float_bytes(source)
    if size <= MAX_PROBED_BYTES:
        return None
    return (
        f"the base's weights have {size / 1e9:.1f} GB, and the comparison loads them in float32; the limit is "
        f"{MAX_PROBED_BYTES / 1e9:.0f} GB"
    )


def _compare(source: BaseSource, manifest: Manifest, answers: Answers) -> int:
    from server.cli.parity import MAX_DIFFERENCE, compare

    try:
        parity = compare(source, manifest, answers)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, OSError) as error:
        say_row("PEFT parity", f"FAILED: PEFT cannot load the adapter ({type(error).__name__}: {error!s:.300})")
        return 1
    say_row(
        "PEFT parity",
        f"{'passed' if parity.holds else 'FAILED'}: logits differ by {parity.difference:.1e} of the largest logit "
        f"(limit {MAX_DIFFERENCE:g}); {parity.num_equal} of {parity.num_tokens} greedy tokens are equal",
    )
    say_row("effect", f"the adapter changes the base's logits by up to {parity.effect:.2g} of the largest logit")
    return 0 if parity.holds else 1


def report_rows(
    report: DiagnosticReport,
    base: BaseSignature,
    *,
    base_template: str | None,
    template_trusted: bool,
    delta_norm: float | None,
) -> Iterator[Row]:
    """Label and text of every row. ``delta_norm`` is None if the weights were not prepared."""
    yield from (("problem", problem) for problem in report.problems)
    if report.manifest is not None:
        yield from (("unread", f"{reason}; {UNREAD_FILES[name]}") for name, reason in report.manifest.unread.items())
    yield from _file_rows(report.path)
    yield from _config_rows(report.raw_config)
    if report.plan is not None:
        yield from _module_rows(report.plan, base)
    yield "base", _base(report, base)
    if report.manifest is not None:
        note = report.manifest.base_note
        yield "base check", f"by {report.manifest.base_check}" + ("" if note is None else f": {note}")
    if report.defaults is not None:
        yield from _default_rows(report.defaults)
        yield from _token_rows(report.defaults, base)
        yield "template", _template(report, base_template, trusted=template_trusted)
    if report.sidecar is not None and report.sidecar.verdict is not None:
        yield "verdict", _verdict(report.sidecar.verdict)
    if report.plan is not None:
        yield "memory", f"{_size(report.plan.num_bytes)} at most"
    if delta_norm is not None:
        yield "delta norm", f"{delta_norm:.4g}"
    if report.manifest is not None:
        yield "digests", f"version {report.manifest.version_digest}"
        yield "", f"weights {report.manifest.weights_digest}"
    if report.source:
        repo_id, revision, added = (_short(report.source.get(name)) for name in ("repo_id", "revision", "added"))
        yield "source", f"fetched from {repo_id} at {revision}, {added}"


def _file_rows(folder: Path) -> Iterator[Row]:
    label, paths = "files", []
    with contextlib.suppress(OSError):
        paths = sorted(folder.iterdir())
    for path in paths[:_MOST_FILES]:
        with contextlib.suppress(OSError):
            status = path.lstat()
            note = "" if path.name in _FILES_READ else ", not read"
            if stat.S_ISLNK(status.st_mode):
                note += f", a link to {_quoted(str(path.readlink()))}"
            elif not stat.S_ISREG(status.st_mode):
                note += ", no file"
            yield label, f"{path.name:<27}{_size(status.st_size)}{note}"
            label = ""
    if len(paths) > _MOST_FILES:
        yield label, f"and {len(paths) - _MOST_FILES} more"


def _config_rows(config: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of ``adapter_config.json`` as it stands in the file, unchecked."""
    if not config:
        return
    version = f" as PEFT {_short(config['peft_version'])} writes it" if config.get("peft_version") else ""
    kind = [_short(config.get("peft_type")) + version]
    flags = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "lora_bias": "biases of B"}
    kind += [label for name, label in flags.items() if config.get(name)]
    values = ("modules_to_save", "target_parameters", "trainable_token_indices")
    kind += [f"{name} {_short(config[name])}" for name in values if config.get(name)]
    if config.get("bias") not in (None, "none"):
        kind.append(f"bias {_short(config['bias'])}")
    yield "kind", ", ".join(kind)
    ranks = [f"r {_short(config.get('r'))}", f"lora_alpha {_short(config.get('lora_alpha'))}"]
    ranks += [f"{name} for {len(config[name])}" for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    yield "config", ", ".join(ranks)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets:
        yield "targets", f"{_short(targets)} (a regular expression, which is not evaluated)"
    elif isinstance(targets, list):
        yield "targets", _short(", ".join(str(target) for target in targets) or "none")
    else:
        yield "targets", _short(targets or "none")


def _module_rows(plan: AdapterPlan, base: BaseSignature) -> Iterator[Row]:
    deltas: list[LowRank] = []
    for part in plan.parts.values():
        deltas += part.low_ranks
    if deltas:
        ranks, scalings = [delta.rank for delta in deltas], [delta.scaling for delta in deltas]
        yield "rank", f"{_range(ranks)}, scaling {_range(scalings)}"
    ends = Counter(module.rpartition(".")[2] for module in plan.modules)
    shown = ", ".join(f"{end} {count}" for end, count in ends.most_common(12))
    yield "modules", f"{len(plan.modules)} of the base's {len(base.modules)}: {shown}"


def _base(report: DiagnosticReport, base: BaseSignature) -> str:
    """The server's base, and whether the adapter was trained on it."""
    reference = None if report.sidecar is None else report.sidecar.base
    version = 2 if reference is None or reference.fingerprint_v2 else 1
    served = f"{base.name} ({base.fingerprint_of(version)[:19]})"
    if reference is None:
        fits = "" if report.plan is None else ", tensor shapes match"
        trained_on = report.raw_config.get("base_model_name_or_path")
        return f"{served}{fits}" + (f"; adapter_config.json names the base {_short(trained_on)}" if trained_on else "")
    with contextlib.suppress(ValueError):
        base_check(report.sidecar, base)
        return f"{served}, the base that the adapter was trained on"
    return f"{served}; the adapter was trained on {reference.name} ({reference.best_fingerprint[:19]})"


def _verdict(verdict: Verdict) -> str:
    """The trainer's verdict, and its checks that did not pass."""
    not_passed = [f"{name} {check.status}" for name, check in verdict.checks.items() if check.status != "pass"]
    return ", ".join([verdict.status, *not_passed])


def _default_rows(defaults: GenerationDefaults) -> Iterator[Row]:
    if (prompt := defaults.system_prompt) is not None:
        yield "prompt", f"{len(prompt)} characters: {_quoted(prompt)}"
    if stops := (*defaults.stop, *defaults.end_tokens, *defaults.eos):
        yield "stop", ", ".join(_quoted(stop) for stop in stops)
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens")
    if sampling := [f"{name} {value}" for name in names if (value := getattr(defaults, name)) is not None]:
        yield "sampling", ", ".join(sampling)
    if variables := defaults.chat_template_kwargs:
        yield "variables", ", ".join(f"{name} {_quoted(value)}" for name, value in variables.items())


def _token_rows(defaults: GenerationDefaults, base: BaseSignature) -> Iterator[Row]:
    """Added tokens that the base's tokenizer lacks or defines otherwise."""
    of_base = set() if base.tokenizer is None else set(base.tokenizer.added)
    tokens = [f"{_quoted(token.content)} {token.id}" for token in defaults.added_tokens if token not in of_base]
    if tokens:
        more = f" and {len(tokens) - _MOST_FILES} more" if len(tokens) > _MOST_FILES else ""
        yield "tokens", ", ".join(tokens[:_MOST_FILES]) + more


def _template(report: DiagnosticReport, base_template: str | None, *, trusted: bool) -> str:
    assert report.defaults is not None
    if report.defaults.chat_template in (None, base_template):
        return "the base's"
    if report.sidecar is not None and report.sidecar.chat_template is not None and not report.source:
        return f"the adapter's own, from {SIDECAR_FILE}"
    if trusted:
        return "the adapter's own, from another tool or a hub: trusted, rendered in a sandbox"
    return (
        "the adapter's own, from another tool or a hub: not trusted; set --trust-chat-templates or --trusted-templates"
    )


def _range(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _quoted(value: object) -> str:
    return _short(repr(value))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."


def _size(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes"
