"""The adapter's card: ``README.md`` as hubs read it, with ``loss.png`` beside it where matplotlib is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from adapter_format.sidecar import Sidecar
from trainer.config import TrainConfig
from trainer.train import History


@dataclass(frozen=True)
class Sample:
    """One question with the answers of the base and of the adapter."""

    question: str
    base_answer: str
    answer: str


def render_card(config: TrainConfig, sidecar: Sidecar, samples: Sequence[Sample]) -> str:
    front = {
        "base_model": sidecar.base.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {config.name}",
        config.description,
        _facts(config, sidecar),
        "![Loss by step](loss.png)" if can_plot() else "",
        _samples(samples),
        f"## Recipe\n\n```yaml\n{_recipe(sidecar)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot_loss(history: History, path: Path) -> None:
    """Training and held-out loss by step, as PNG; without matplotlib a message on stderr."""
    if not can_plot():
        print(
            f"no {path.name}: matplotlib is not installed; pip install 'quickchange[plot]'",
            file=sys.stderr,
        )
        return
    import matplotlib  # takes a second to import; only a finished run needs it

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(history.steps) + 1), history.steps, linewidth=1, label="training")
    if history.evaluations:
        steps, losses = zip(*history.evaluations, strict=True)
        axes.plot(steps, losses, marker="o", label="held out")
    if history.base_eval_loss is not None:
        axes.axhline(history.base_eval_loss, linestyle="--", color="grey", label="held out, base")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _facts(config: TrainConfig, sidecar: Sidecar) -> str:
    training, metrics = sidecar.training, sidecar.metrics
    assert training is not None and metrics is not None, "the trainer writes both"
    rows = [
        ("base", f"{sidecar.base.name} (`{sidecar.base.best_fingerprint[:19]}`)"),
        ("LoRA", f"rank {config.lora.r}, alpha {config.lora.alpha:g}, {_targets(config)}"),
        ("data", f"{training.num_examples} examples (`{training.data_digest[:19]}`)"),
        (
            "training",
            f"{training.steps} steps, {training.epochs:g} epochs, {training.num_trained_tokens} trained tokens",
        ),
        ("time", f"{training.duration_s / 60:.1f} minutes"),
        ("training loss", f"{metrics.train_loss:.3f}"),
    ]
    if metrics.eval_loss is not None and metrics.base_eval_loss is not None:
        rows.append(("held-out loss", f"{metrics.eval_loss:.3f} (base: {metrics.base_eval_loss:.3f})"))
        rows.append(
            ("held-out perplexity", f"{metrics.eval_perplexity:.2f} (base: {metrics.base_eval_perplexity:.2f})")
        )
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _targets(config: TrainConfig) -> str:
    targets = config.lora.target_modules
    return targets if isinstance(targets, str) else ", ".join(targets)


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    return "## Samples\n\n" + "\n\n".join(
        f"**{sample.question}**\n\nAdapter:\n\n{_quoted(sample.answer)}\n\nBase:\n\n{_quoted(sample.base_answer)}"
        for sample in samples
    )


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in (text or "(nothing)").split("\n"))


def _recipe(sidecar: Sidecar) -> str:
    recipe = {} if sidecar.training is None else sidecar.training.recipe
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
