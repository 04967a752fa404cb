"""Publishes a trained adapter: writes a temporary folder, reads it back, compares logits, and renames it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel

from adapter_format.files import CARD_FILE, SIDECAR_FILE
from adapter_format.publishing import published_folder
from adapter_format.sidecar import Sidecar
from trainer.batches import collate
from trainer.card import Sample, plot_loss, render_card
from trainer.config import TrainConfig
from trainer.errors import PublishError
from trainer.loss import full_logits
from trainer.masking import Encoded
from trainer.train import SAVE_DTYPES, History

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

    The check removes the LoRA layers of ``model``. Raises ``PublishError`` where the folder cannot be written or, read
    back, is not the adapter that was trained. Whatever fails, ``target`` stays as it was and no temporary folder
    remains.
    """
    try:
        with published_folder(target, replace=True) as partial:
            save_adapter(model, partial, dtype=SAVE_DTYPES[config.lora.save_dtype])
            (partial / SIDECAR_FILE).write_text(sidecar.to_json(), encoding="utf-8")
            (partial / CARD_FILE).write_text(render_card(config, sidecar, samples), encoding="utf-8")
            plot_loss(history, partial / "loss.png")
            _verify(model, partial, probe)
    except OSError as error:
        raise PublishError(f"{error}; nothing was published") from error


def save_adapter(model: PeftModel, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write PEFT's two files, weights in ``dtype``; the same adapter gives the same bytes."""
    config = cast(LoraConfig, model.peft_config["default"])
    config.target_modules = sorted(config.target_modules or ())  # the order of a set differs between processes
    weights = {name: weight.to(dtype) for name, weight in model.named_parameters() if weight.requires_grad}
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)


def _verify(model: PeftModel, folder: Path, probe: torch.Tensor) -> None:
    """Load ``folder`` with PEFT on the base: logits must be those of training, and differ from the base's."""
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
