"""``quickchange adapters check``: everything about one adapter folder, what is wrong with it, and a probe by PEFT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from base_files.locate import find_base, num_weight_bytes
from server.adapters.content.diagnostics import DiagnosticReport
from server.adapters.content.manifest import Manifest
from server.adapters.names import is_name
from server.cli.adapters_report import report
from server.cli.folders import adapter_folders
from server.cli.options import command_parser, parse_options
from server.cli.settings import parse_settings
from server.cli.terminal import say, say_row
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

    with closing(AdapterChecker.load(settings, dtype="float32" if probed else settings.dtype)) as checker:
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
