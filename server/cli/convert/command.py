"""``quickchange adapters convert``: adapters of other kinds and other trainers as plain LoRA in PEFT's format.

Other tuners of PEFT are rewritten by PEFT: a singular value decomposition of what each module's weight gains, cut to a
rank. How near that comes is measured on the base, and what is too far off is not published. Other formats are
``source``'s: the same numbers under other names and in another order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_format.files import CONFIG_FILE, WEIGHTS_FILE
from adapter_format.publishing import published_folder
from base_files.locate import find_base
from server.cli.adapters_add import shown_size
from server.cli.command_line import command_parser, parse_options, parse_settings, say
from server.cli.convert.source import Format, default_name, find_source, format_of, publish_converted, read_source
from server.cli.folders import NotPublished, choose_target
from server.settings import Settings

if TYPE_CHECKING:
    from server.cli.convert.tuners import Conversion

DESCRIPTION = """\
Write SOURCE as plain LoRA in PEFT's format, beside the other adapters. SOURCE is one of

  a folder of mlx-lm             adapters.safetensors and mlx-lm's adapter_config.json, LoRA or DoRA
  a .gguf file, or its folder    a LoRA adapter as llama.cpp's convert_lora_to_gguf.py writes it
  a Modelfile of Ollama          its ADAPTER is converted; SYSTEM, PARAMETER, TEMPLATE become its defaults
  a folder of PEFT               an adapter which the server refuses because it is not plain LoRA

The base must be the one it was trained on (--base-model). The first three are checked against it by names and shapes.
For the last one it is loaded in float32, to measure how near LoRA comes."""

BY_PEFT = frozenset({
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA",
    "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip
"""Tuners whose gain PEFT itself can tell."""

BY_MERGING = frozenset({
    "ADALORA", "BOFT", "DEFT", "GLORA", "HIRA", "HRA", "IA3", "LORA", "OFT", "OSF", "PEANUT", "PVERA", "ROAD",
    "SHIRA", "SUPERTUNING",
})  # fmt: skip
"""Tuners whose gain is what merging them adds. PEFT tells none, or leaves out what LoRA's inits and variants do."""

_LOST = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
    "arrow_config", "megatron_config", "bias", "lora_bias",
)  # fmt: skip
"""Fields for what is no gain of a weight, and would be lost."""

_UNKNOWN_INITS = ("corda", "lora_ga", "pissa_niter")
"""Inits that change the base by what stands in neither of the adapter's files: gradients, activations, chance."""

DEFAULT_ENERGY, DEFAULT_MAX_ERROR, MOST_LOST = 0.9999, 0.01, 0.1
"""``MOST_LOST`` limits the difference as a share of the adapter's own effect, which of a weak adapter is small."""


def main(arguments: Sequence[str]) -> int:
    """Convert, check and publish; the exit status is 1 where there is no new adapter afterwards."""
    try:
        options, settings = _parse(arguments)
        kind = format_of(options.source)
        target = _choose_target(options, settings, kind)
        if kind == "peft":
            _convert_tuner(options, settings, target)
        else:
            _convert_format(options, settings, target, kind)
    except PermissionError as error:
        print(f"quickchange: permission denied: {error.filename}", file=sys.stderr)
        return 1
    except (NotPublished, OSError) as error:
        print(f"quickchange: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"next: quickchange adapters check {target if options.out else target.name}")
    return 0


def _convert_format(options: argparse.Namespace, settings: Settings, target: Path, kind: Format) -> None:
    """Convert an adapter of another trainer, and print the result."""
    source = read_source(
        options.source, kind, max_bytes=settings.max_adapter_bytes, chat_template=options.chat_template
    )
    made = publish_converted(source, target, settings)
    say(
        f"{target.name}: {source.adapter.kind} as PEFT's, of rank {made.rank} on {made.num_modules} modules, "
        f"{shown_size(made.num_bytes)}, in {target}"
    )
    for line in made.notes:
        say(line)
    say(f"checked: every tensor fits the base {settings.base_name} by name and shape")


def _convert_tuner(options: argparse.Namespace, settings: Settings, target: Path) -> None:
    """Convert an adapter of another tuner of PEFT, measure, and print the result."""
    config = _read_config(options.source)
    base_source = find_base(settings.base_model)
    from server.cli.convert.tuners import convert  # imports torch, which takes seconds

    with published_folder(target) as folder:
        found = convert(
            options.source,
            folder,
            base_source,
            config=config,
            merging=config["peft_type"] in BY_MERGING,
            rank=options.rank or options.energy,
            threads=settings.threads,
        )
        _check(found, options, settings)
    ranks = sorted({min(found.ranks), max(found.ranks)})
    print(
        f"{target.name}: {config['peft_type']} as LoRA of rank {' to '.join(map(str, ranks))} on {len(found.ranks)} "
        f"modules, {found.num_bytes / 1e6:.1f} MB, in {target}"
    )
    print(f"its logits differ by {_measured(found)}")


def _choose_target(options: argparse.Namespace, settings: Settings, kind: Format) -> Path:
    """The folder to make. Raises ``NotPublished``."""
    if options.out is None:
        return choose_target(settings, options.name or default_name(options.source, kind))
    out = options.out.absolute()
    return choose_target(settings.model_copy(update={"adapters_dir": out.parent}), out.name)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    parser = command_parser("adapters convert", DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a folder, a .gguf file or a Modelfile")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--name", help="what the new adapter is called; without it, SOURCE's name (of PEFT's, and '-lora')"
    )
    place.add_argument("--out", metavar="DIR", type=Path, help="the folder to make, instead of one in --adapters-dir")
    template = "for a Modelfile, instead of its TEMPLATE: 'base' for the base's own chat template, or a file in Jinja"
    parser.add_argument("--chat-template", metavar="base|FILE", help=template)
    tuners = parser.add_argument_group("for other tuners of PEFT")
    size = tuners.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="the same rank for every module")
    size.add_argument(
        "--energy", type=float,
        help=f"the share of each module's gain to keep, as a sum of squares; it decides the ranks ({DEFAULT_ENERGY})",
    )  # fmt: skip
    error = f"the largest difference of logits, as a share of the largest logit ({DEFAULT_MAX_ERROR})"
    tuners.add_argument("--max-error", type=float, help=error)
    options, rest = parse_options(parser, arguments)
    options.source = find_source(options.source)
    _check_options(parser, options)
    return options, parse_settings("adapters convert", rest)


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Flags out of range, and flags that do nothing for this source, are bad usage; then come the defaults."""
    kind = format_of(options.source)
    given = [flag for flag in ("rank", "energy", "max_error") if getattr(options, flag) is not None]
    if given and kind != "peft":
        parser.error(f"--{given[0].replace('_', '-')} is for other tuners of PEFT, and {options.source} is none")
    if options.chat_template is not None and kind != "modelfile":
        parser.error(f"--chat-template is for a Modelfile, and {options.source} is none")
    options.energy = DEFAULT_ENERGY if options.energy is None else options.energy
    options.max_error = DEFAULT_MAX_ERROR if options.max_error is None else options.max_error
    if options.rank is not None and options.rank < 1:
        parser.error("--rank must be 1 or more")
    if not 0 < options.energy < 1:
        parser.error("--energy must lie between 0 and 1")
    if not options.max_error > 0:
        parser.error("--max-error must be more than 0")


def _read_config(folder: Path) -> Mapping[str, Any]:
    """The config of an adapter that PEFT may load. Raises ``NotPublished``."""
    path = folder / CONFIG_FILE
    if not folder.exists():
        raise NotPublished(f"there is no {folder}")
    if missing := [str(needed) for needed in (path, folder / WEIGHTS_FILE) if not needed.is_file()]:
        raise NotPublished(f"{missing[0]} is missing; pickled weights are not read: save them as safetensors first")
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise NotPublished(f"{path} cannot be read: {error}") from None
    _check_config(config)
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    if not isinstance(kind, str) or kind not in BY_PEFT | BY_MERGING:
        raise NotPublished(f"peft_type {kind!r:.80} cannot be written as LoRA: train the adapter again, with LoRA")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise NotPublished(f"task_type is {config['task_type']!r:.80}: only CAUSAL_LM adapters are converted")
    if lost := [name for name in _LOST if config.get(name) and config[name] != "none"]:
        raise NotPublished(f"it uses {', '.join(lost)}, which LoRA on linear layers cannot express")
    named = isinstance(init, str) and init.lower().startswith(_UNKNOWN_INITS)
    if named or config.get("corda_config") or config.get("lora_ga_config"):
        raise NotPublished(
            f"init_lora_weights {init!r:.80} changed the base in a way that the adapter's files do not tell: save the "
            "adapter with path_initial_model_for_weight_conversion where it was trained"
        )
    if (mapping := config.get("auto_mapping")) is not None:
        library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
        if not f"{library}.".startswith("transformers."):
            raise NotPublished(f"auto_mapping names {library!r:.80}: only models of transformers are loaded")


def _check(found: Conversion, options: argparse.Namespace, settings: Settings) -> None:
    """Raises ``NotPublished`` if the server would refuse the result, or it differs too much from the source."""
    if not (found.error <= options.max_error and found.lost <= MOST_LOST):
        raise NotPublished(
            f"as LoRA of rank {max(found.ranks)} at most, the logits differ by {_measured(found)}; allowed are "
            f"{options.max_error:.2g} (--max-error) and {MOST_LOST}: raise --rank, or --energy above {options.energy}"
        )
    for what, needed, limit, setting in (
        ("rank", max(found.ranks), settings.max_lora_rank, "max_lora_rank"),
        ("size in bytes", found.num_bytes, settings.max_adapter_bytes, "max_adapter_bytes"),
    ):
        if needed > limit:
            raise NotPublished(f"its {what} {needed} exceeds {setting} {limit}: raise it, or lower --energy or --rank")


def _measured(found: Conversion) -> str:
    return f"{found.error:.2g} of the largest logit, {found.lost:.2g} of what the adapter changes"
