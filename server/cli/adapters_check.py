"""``quickchange adapters check``: everything about one adapter folder, what is wrong with it, and a probe by PEFT."""

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
from base_files.locate import find_base, num_weight_bytes
from server.adapters.content.diagnostics import DiagnosticReport
from server.adapters.content.folder import OPTIONAL_FILES, UNREAD_FILES
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import Manifest
from server.adapters.content.module_plan import LowRank
from server.adapters.content.plan import AdapterPlan
from server.adapters.content.signature import BaseSignature, base_check
from server.adapters.names import is_name
from server.cli.command_line import command_parser, parse_options, parse_settings, say, say_row
from server.cli.folders import adapter_folders
from server.settings import Settings

if TYPE_CHECKING:
    from server.cli.parity import Answers

DESCRIPTION = """\
Everything about one adapter: files, what PEFT's config says, what it does to which modules of the base, how it wants to
be talked to, memory and digests; and all that is wrong with it. The base of the settings is loaded on the CPU.
Where the adapter would be served, two prompts of 20 tokens and 8 tokens of answer go through the server's engine and
through PEFT, and their logits are compared. The exit status is 0 where it is served, and answers as under PEFT."""

MAX_PROBED_BYTES = 8_000_000_000
"""A larger base would be in memory a second time, and in float32."""

Row = tuple[str, str]
_READ = (CONFIG_FILE, WEIGHTS_FILE, TOKENS_FILE, *OPTIONAL_FILES)
_MOST_FILES, _MOST_CHARS = 40, 160


def main(arguments: Sequence[str]) -> int:
    """Print everything; the exit status is 1 where the adapter is not served or answers otherwise than under PEFT."""
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
            f"quickchange: there is no folder {options.adapter}, nor an adapter so called in {places}", file=sys.stderr
        )
        return 1
    base_folder = find_base(settings.base_model)
    unprobed = _why_unprobed(base_folder, wanted=not options.no_probe)
    found, answers = _examine(path, settings, probed=unprobed is None)
    if found.problems or found.manifest is None:
        return 1
    if answers is None:
        say_row("PEFT parity", f"not probed: {unprobed}")
        return 0
    return _probe(base_folder, found.manifest, answers)


def find_folder(text: str, folders: Sequence[Path]) -> Path | None:
    """A name in the adapter folders, the first of which wins, else any folder; None where there is neither."""
    named = [folder / text for folder in folders if is_name(text)]
    return next((path for path in (*named, Path(text)) if path.is_dir()), None)


def _examine(path: Path, settings: Settings, *, probed: bool) -> tuple[DiagnosticReport, Answers | None]:
    """Print what there is to know, and let the adapter answer; the base is out of memory afterwards."""
    from server.cli.adapter_checker import AdapterChecker  # torch, and seconds
    from server.cli.parity import answer_here

    with contextlib.closing(AdapterChecker.load(settings, dtype="float32" if probed else settings.dtype)) as checker:
        found, weights = checker.check(path)
        served = f"served as {found.name}" if weights is not None else "NOT SERVED"
        say(f"{path}: {served}")
        rows = report(
            found,
            checker.base.signature,
            base_template=checker.prompts.chat_template,
            trusting=settings.trust_chat_templates or found.name in settings.trusted_names,
            delta_norm=None if weights is None else weights.delta_norm,
        )
        for label, text in rows:
            say_row(label, text)
        if weights is None or found.manifest is None or not probed:
            return found, None
        return found, answer_here(checker.base, found.manifest, weights)


def _why_unprobed(base_folder: Path, *, wanted: bool) -> str | None:
    if not wanted:
        return "--no-probe was given"
    if (size := num_weight_bytes(base_folder)) > MAX_PROBED_BYTES:
        return (
            f"the base's weights have {size / 1e9:.1f} GB, and the probe needs them in float32; it is made up to "
            f"{MAX_PROBED_BYTES / 1e9:.0f} GB"
        )
    return None


def _probe(base_folder: Path, manifest: Manifest, answers: Answers) -> int:
    from server.cli.parity import MAX_DIFFERENCE, compare

    try:
        parity = compare(base_folder, manifest, answers)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, OSError) as error:
        say_row("PEFT parity", f"FAILED: PEFT cannot load it ({type(error).__name__}: {error!s:.300})")
        return 1
    verdict = "holds" if parity.holds else "FAILED"
    say_row(
        "PEFT parity",
        f"{verdict}: logits differ by {parity.difference:.1e} of the largest, allowed are {MAX_DIFFERENCE:g}; "
        f"{parity.num_equal} of {parity.num_tokens} greedy tokens are equal",
    )
    say_row("effect", f"it changes logits of the base by up to {parity.effect:.2g} of the largest")
    return 0 if parity.holds else 1


def report(
    found: DiagnosticReport, base: BaseSignature, *, base_template: str | None, trusting: bool, delta_norm: float | None
) -> Iterator[Row]:
    """Every row that can be told; ``delta_norm`` is None where the weights were not prepared.

    ``trusting`` says whether chat templates are used that are neither the base's nor a sidecar's.
    """
    yield from (("problem", problem) for problem in found.problems)
    if found.manifest is not None:
        yield from (("unread", f"{reason}; {UNREAD_FILES[name]}") for name, reason in found.manifest.unread.items())
    yield from _files(found.path)
    yield from _config(found.said)
    if found.plan is not None:
        yield from _modules(found.plan, base)
    yield "base", _base(found, base)
    if found.manifest is not None:
        yield "base check", f"by {found.manifest.base_check}"
    if found.defaults is not None:
        yield from _default_rows(found.defaults)
        yield from _tokens(found.defaults, base)
        yield "template", _template(found, base_template, trusting=trusting)
    if found.sidecar is not None and found.sidecar.verdict is not None:
        yield from _verdict(found.sidecar.verdict)
    if found.plan is not None:
        yield "memory", f"{_size(found.plan.num_bytes)} at most"
    if delta_norm is not None:
        yield "delta norm", f"{delta_norm:.4g}"
    if found.manifest is not None:
        yield "digests", f"version {found.manifest.version_digest}"
        yield "", f"weights {found.manifest.weights_digest}"
    if found.source:
        said = (found.source.get(name) for name in ("repo_id", "revision", "added"))
        yield "source", "fetched from {} at {}, {}".format(*(_short(one) for one in said))


def _files(path: Path) -> Iterator[Row]:
    label, names = "files", []
    with contextlib.suppress(OSError):
        names = sorted(path.iterdir())
    for one in names[:_MOST_FILES]:
        with contextlib.suppress(OSError):
            status = one.lstat()
            note = "" if one.name in _READ else ", not read"
            if not stat.S_ISREG(status.st_mode):
                link = stat.S_ISLNK(status.st_mode)
                note += f", a link to {_quoted(str(one.readlink()))}" if link else ", no file"
            yield label, f"{one.name:<27}{_size(status.st_size)}{note}"
            label = ""
    if len(names) > _MOST_FILES:
        yield label, f"and {len(names) - _MOST_FILES} more"


def _config(said: Mapping[str, Any]) -> Iterator[Row]:
    if not said:
        return
    flags = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "lora_bias": "biases of B"}
    words = [word for name, word in flags.items() if said.get(name)]
    values = ("modules_to_save", "target_parameters", "trainable_token_indices")
    words += [f"{name} {_short(said[name])}" for name in values if said.get(name)]
    words += [f"bias {_short(said['bias'])}"] if said.get("bias") not in (None, "none") else []
    version = f" as PEFT {_short(said['peft_version'])} writes it" if said.get("peft_version") else ""
    yield "kind", ", ".join([_short(said.get("peft_type")) + version, *words])
    patterns = [f"{name} for {len(said[name])}" for name in ("rank_pattern", "alpha_pattern") if said.get(name)]
    yield "config", ", ".join([f"r {_short(said.get('r'))}", f"lora_alpha {_short(said.get('lora_alpha'))}", *patterns])
    targets = said.get("target_modules")
    listed = ", ".join(str(one) for one in targets) if isinstance(targets, list) else targets
    yield (
        "targets",
        _short(listed or "none") + (" (an expression, which is not evaluated)" if isinstance(targets, str) else ""),
    )


def _modules(plan: AdapterPlan, base: BaseSignature) -> Iterator[Row]:
    deltas: list[LowRank] = []
    for part in plan.parts.values():
        deltas += part.parameters.values() if part.low_rank is None else [part.low_rank, *part.parameters.values()]
    if deltas:
        ranks, scalings = [one.rank for one in deltas], [one.scaling for one in deltas]
        yield "rank", f"{_range(ranks)}, scaling {_range(scalings)}"
    ends = Counter(module.rpartition(".")[2] for module in plan.modules)
    shown = ", ".join(f"{end} {count}" for end, count in ends.most_common(12))
    yield "modules", f"{len(plan.modules)} of the base's {len(base.modules)}: {shown}"


def _base(found: DiagnosticReport, base: BaseSignature) -> str:
    theirs = None if found.sidecar is None else found.sidecar.base
    ours = f"{base.name} ({base.fingerprint_of(2 if theirs is None or theirs.fingerprint_v2 else 1)[:19]})"
    if theirs is None:
        fits = "" if found.plan is None else ", whose shapes it fits"
        named = found.said.get("base_model_name_or_path")
        return f"{ours}{fits}" + (f"; PEFT's config says it was trained on {_short(named)}" if named else "")
    with contextlib.suppress(ValueError):
        base_check(found.sidecar, base)
        return f"{ours}, the very one it was trained on"
    return f"{ours}; it was trained on {theirs.name} ({theirs.best_fingerprint[:19]})"


def _verdict(verdict: Verdict) -> Iterator[Row]:
    """What its trainer found, and the checks that it did not pass."""
    others = [f"{name} {check.status}" for name, check in verdict.checks.items() if check.status != "pass"]
    yield "verdict", ", ".join([verdict.status, *others])


def _default_rows(defaults: GenerationDefaults) -> Iterator[Row]:
    if (prompt := defaults.system_prompt) is not None:
        yield "prompt", f"{len(prompt)} characters: {_quoted(prompt)}"
    if defaults.stop or defaults.end_tokens or defaults.eos:
        yield "stop", ", ".join(_quoted(one) for one in (*defaults.stop, *defaults.end_tokens, *defaults.eos))
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens")
    if sampling := [f"{name} {value}" for name in names if (value := getattr(defaults, name)) is not None]:
        yield "sampling", ", ".join(sampling)
    if variables := defaults.chat_template_kwargs:
        yield "variables", ", ".join(f"{name} {_quoted(value)}" for name, value in variables.items())


def _tokens(defaults: GenerationDefaults, base: BaseSignature) -> Iterator[Row]:
    """Added tokens that the base's tokenizer does not have in this way."""
    own = set() if base.tokenizer is None else set(base.tokenizer.added)
    if new := [f"{_quoted(token.content)} {token.id}" for token in defaults.added_tokens if token not in own]:
        yield (
            "tokens",
            ", ".join(new[:_MOST_FILES]) + (f" and {len(new) - _MOST_FILES} more" * (len(new) > _MOST_FILES)),
        )


def _template(found: DiagnosticReport, base_template: str | None, *, trusting: bool) -> str:
    assert found.defaults is not None
    if found.defaults.chat_template in (None, base_template):
        return "the base's"
    if found.sidecar is not None and found.sidecar.chat_template is not None and not found.source:
        return f"its own, from {SIDECAR_FILE}"
    trust = (
        "trusted, and rendered in a sandbox"
        if trusting
        else "not trusted without --trust-chat-templates or --trusted-templates"
    )
    return f"a stranger's, which is not the base's: {trust}"


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
