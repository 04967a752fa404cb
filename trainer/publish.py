"""Publishes a trained adapter: written beside its place, read back and compared, and only then renamed to its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel

from trainer.batches import collate
from trainer.card import Sample, plot_loss, render_card
from trainer.config import TrainConfig
from trainer.errors import PublishError
from trainer.loss import full_logits
from trainer.masking import Encoded
from trainer.sidecar import FILE_NAME, Sidecar
from trainer.train import History

TOLERANCE = 1e-4
NUM_PROBES = 2
PROBE_TOKENS = 64


def probe_batch(examples: Sequence[Encoded]) -> torch.Tensor:
    """Token ids of a few examples, [rows, length], for comparing logits."""
    chosen = [
        Encoded(example.input_ids[:PROBE_TOKENS], example.labels[:PROBE_TOKENS]) for example in examples[:NUM_PROBES]
    ]
    return collate(chosen).input_ids


def publish(
    model: PeftModel,
    target: Path,
    *,
    config: TrainConfig,
    sidecar: Sidecar,
    history: History,
    samples: Sequence[Sample],
    probe: torch.Tensor,
) -> None:
    """Make ``target`` the adapter's folder, replacing what was there.

    The check takes ``model`` apart: its LoRA layers are gone afterwards. Raises ``PublishError`` where the folder, read
    back, is not the adapter that was trained. Whatever fails, ``target`` stays as it was and nothing is left beside it.
    """
    with _published_folder(target) as partial:
        save_adapter(model, partial)
        (partial / FILE_NAME).write_text(sidecar.to_json(), encoding="utf-8")
        (partial / "README.md").write_text(render_card(config, sidecar, samples), encoding="utf-8")
        plot_loss(history, partial / "loss.png")
        _verify(model, partial, probe)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """PEFT's two files, the same bytes for the same adapter."""
    config = cast(LoraConfig, model.peft_config["default"])
    config.target_modules = sorted(config.target_modules or ())  # a set of strings has another order in every process
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _verify(model: PeftModel, folder: Path, probe: torch.Tensor) -> None:
    """Load ``folder`` with PEFT on the bare base: its logits must be those of training, and not those of the base."""
    model.eval()
    with torch.inference_mode():
        trained = full_logits(model, probe)
        base = model.unload()
        untouched = full_logits(base, probe)
        loaded = full_logits(PeftModel.from_pretrained(base, str(folder)).eval(), probe)
    difference = float((loaded - trained).abs().max())
    if not difference <= TOLERANCE:
        raise PublishError(
            f"read back, the adapter's logits differ from training's by {difference:.2g}; nothing was published"
        )
    if torch.equal(loaded, untouched):
        raise PublishError(
            "the adapter changes nothing: its logits are the base's; train longer or raise lr. Nothing was published"
        )


@contextmanager
def _published_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to fill; it takes its place when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        _settle(partial)
        _replace(target, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _settle(folder: Path) -> None:
    """Give every file the mode of the sidecar (safetensors' are private) and wait until all are on disk."""
    for path in sorted(folder.iterdir()):
        shutil.copymode(folder / FILE_NAME, path)
        _fsync(path)
    _fsync(folder)


def _replace(target: Path, partial: Path) -> None:
    """Rename ``partial`` to ``target``. What stood there is moved aside first, and moved back if that fails."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
