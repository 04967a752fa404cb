"""One training run: from a recipe to a published adapter folder."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from adapter_format.sidecar import BaseReference, Sidecar, TrainingMetrics, TrainingRecord
from cpu_kernels.cores import find_cores
from trainer.base import TrainingBase, load_base
from trainer.card import Sample
from trainer.config import TrainConfig
from trainer.data import Dataset, load_dataset
from trainer.errors import RecipeError
from trainer.generate import answer
from trainer.publish import probe_batch, publish
from trainer.train import History, add_lora, train


def train_and_publish(config: TrainConfig, target: Path) -> Sidecar:
    """Train the adapter of ``config`` and publish it as the folder ``target``; returns its sidecar."""
    if target.exists() and not (target / "adapter_config.json").is_file():
        raise RecipeError(f"{target}: exists and is not an adapter folder, so it is not replaced; choose another --out")
    _quiet_libraries()
    _set_threads(config.threads)
    base = load_base(config.base_model)
    _check_length(config, base)
    dataset = load_dataset(config, base.tokenizer)
    print(dataset.summary(), flush=True)
    model = add_lora(base.model, config.lora, seed=config.seed)
    history = train(model, dataset, config)
    sidecar = _sidecar(config, base, dataset, history)
    publish(
        model,
        target,
        config=config,
        sidecar=sidecar,
        history=history,
        samples=[_sample(model, base.tokenizer, config, question) for question in config.samples],
        probe=probe_batch(dataset.training),
    )
    return sidecar


def _set_threads(threads: int | None) -> None:
    cores = find_cores()
    torch.set_num_threads(threads or cores.default_threads)
    print(f"threads: {torch.get_num_threads()}{' as set' if threads else ''}; this process may use {cores}", flush=True)


def _quiet_libraries() -> None:
    """No progress bars for loading weights, and no FutureWarnings about PEFT's calls of transformers."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _check_length(config: TrainConfig, base: TrainingBase) -> None:
    longest = getattr(base.model.config, "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise RecipeError(
            f"max_length: {config.max_length} is more than the context length of {base.name}; use at most {longest}"
        )


def _sample(model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, question: str) -> Sample:
    def ask() -> str:
        return answer(
            model,
            tokenizer,
            question,
            system_prompt=config.system_prompt,
            stop=config.stop,
            sampling=config.sampling,
            seed=config.seed,
        )

    with model.disable_adapter():
        base_answer = ask()
    return Sample(question, base_answer, ask())


def _sidecar(config: TrainConfig, base: TrainingBase, dataset: Dataset, history: History) -> Sidecar:
    sampling = config.sampling.model_copy(deep=True)
    defaults: dict[str, Any] = {
        "system_prompt": config.system_prompt,
        "end_tokens": [str(base.tokenizer.eos_token)],
        "stop": config.stop,
        "sampling": sampling if sampling.model_dump(exclude_none=True) else None,
    }
    return Sidecar(
        schema_version=2,
        base=_base_reference(base),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        training=TrainingRecord(
            data_digest=dataset.digest,
            num_examples=len(dataset.training),
            num_trained_tokens=history.num_trained_tokens,
            epochs=round(history.epochs, 3),
            steps=len(history.steps),
            seed=config.seed,
            recipe=_portable_recipe(config, base),
            duration_s=round(history.duration_s, 1),
            versions=_versions(),
        ),
        metrics=_metrics(history),
        **{key: value for key, value in defaults.items() if value},
    )


def _base_reference(base: TrainingBase) -> BaseReference:
    """Without the keys that this base's format does not have."""
    reference = {
        "name": base.name,
        "fingerprint": base.fingerprints.v1,
        "fingerprint_v2": base.fingerprints.v2,
        "sample": None if base.sample is None else base.sample.to_json(),
    }
    return BaseReference.model_validate({key: value for key, value in reference.items() if value is not None})


def _portable_recipe(config: TrainConfig, base: TrainingBase) -> dict[str, Any]:
    """The recipe's own keys without this machine's paths: the base by name, data files as the recipe names them."""
    recipe = config.model_dump(mode="json", exclude_unset=True, exclude={"data_root"})
    return {**recipe, "base_model": base.name}


def _metrics(history: History) -> TrainingMetrics:
    return TrainingMetrics(
        train_loss=round(history.train_loss, 4),
        eval_loss=_rounded(history.eval_loss),
        base_eval_loss=_rounded(history.base_eval_loss),
        eval_perplexity=_perplexity(history.eval_loss),
        base_eval_perplexity=_perplexity(history.base_eval_loss),
    )


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else round(math.exp(loss), 4)


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"python": platform.python_version(), **packages}
