"""Random PEFT adapters of any base, written straight to disk: no model is built for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from base_files.source import BaseSource

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapters(
    base: BaseSource,
    folder: Path,
    names: Sequence[str],
    *,
    rank: int = 8,
    targets: Sequence[str] = PROJECTIONS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Path]:
    """One folder ``folder/name`` for each name, in PEFT's format; the same seed and place give the same bytes.

    Raises ``ValueError`` where no linear of the base is called as ``targets`` say.
    """
    shapes = target_shapes(base, targets)
    if not shapes:
        raise ValueError(f"no module of {base.name} is called {' or '.join(targets)}")
    paths = []
    for number, name in enumerate(names):
        paths.append(folder / name)
        paths[-1].mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        tensors = {key: tensor.to(dtype) for key, tensor in _tensors(shapes, rank, generator)}
        save_file(tensors, paths[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
        (paths[-1] / "adapter_config.json").write_text(json.dumps(_config(base, rank, targets), indent=2) + "\n")
    return paths


def target_shapes(base: BaseSource, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of the weight of each linear whose last name is a target, from the headers of the base's files."""
    wanted = re.compile(rf"(.*\.(?:{'|'.join(map(re.escape, targets))}))\.weight")
    shapes = {}
    for name, tensor in base.tensors().items():
        if match := wanted.fullmatch(name):
            out, into = tensor.shape
            shapes[match[1]] = (out, into)
    return shapes


def _tensors(
    shapes: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """A [rank, in] and B [out, rank] of every module, the deltas small beside a base's weights."""
    for module, (out, into) in shapes.items():
        prefix = f"base_model.model.{module}"
        yield f"{prefix}.lora_A.weight", torch.randn(rank, into, generator=generator) * into**-0.5
        yield f"{prefix}.lora_B.weight", torch.randn(out, rank, generator=generator) * 0.02


def _config(base: BaseSource, rank: int, targets: Sequence[str]) -> dict[str, object]:
    return {
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
