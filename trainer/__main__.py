"""The trainer's commands: ``python -m trainer train RECIPE.yaml``.

Exit codes: 0 success, 1 failure or interruption, 2 an error in the recipe, the data or the base.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpu_kernels.spinning import limit_spinning
from cpu_kernels.tiers import TierRefused, use_tier
from trainer.config import TrainerSettings, load_recipe
from trainer.errors import InputError, TrainerError


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, its arguments, and its function."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="what to train, as YAML")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a value of the recipe: lora.r=4",
    )
    parser.add_argument("--cpu", metavar="NAME", help="the instruction set to keep to, such as avx2")
    parser.add_argument("--out", type=Path, help="the folder to publish; without it, NAME in the adapter folder")


def _train(options: argparse.Namespace) -> None:
    settings = TrainerSettings()
    try:
        use_tier(options.cpu or settings.cpu)
    except TierRefused as error:
        raise InputError(str(error)) from None
    config = load_recipe(options.recipe, options.overrides, base_model=settings.base_model)
    target: Path = options.out or settings.adapters_dir / config.name
    from trainer.run import train_and_publish  # imports torch, which takes seconds; a bad recipe fails before

    sidecar = train_and_publish(config, target)
    metrics = sidecar.metrics
    if metrics is not None and metrics.eval_loss is not None:
        print(f"held-out loss {metrics.base_eval_loss} -> {metrics.eval_loss}")
    print(f"published {target}")


COMMANDS = {
    "train": Command("train an adapter from a recipe and publish it", _train_arguments, _train),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Trains LoRA adapters on a CPU.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.help, description=command.help))
    options = parser.parse_args(argv)
    limit_spinning()
    try:
        with _sigterm_as_interrupt():
            COMMANDS[options.command].run(options)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted: an unfinished adapter is not published", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that a half-written folder is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
