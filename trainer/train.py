"""The training loop: LoRA in float32 on a frozen base, the loss normalised by the trained tokens of the whole step.

So the split into micro-batches does not change the gradients; a mean of the micro-batches' means would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from trainer.batches import MicroBatch, by_length, collate, plan_steps
from trainer.config import LoraSettings, TrainConfig
from trainer.data import Dataset
from trainer.errors import RecipeError, TrainingError
from trainer.loss import TokenLoss
from trainer.masking import Encoded
from trainer.progress import Progress

SAVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class History:
    """The measurements of a run; losses are means in nats per trained token."""

    steps: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (steps so far, loss)
    base_eval_loss: float | None = None
    num_trained_tokens: int = 0
    epochs: float = 0.0
    duration_s: float = 0.0

    @property
    def eval_loss(self) -> float | None:
        return self.evaluations[-1][1] if self.evaluations else None

    @property
    def train_loss(self) -> float:
        """The mean over the last tenth of the steps."""
        last = self.steps[-max(1, len(self.steps) // 10) :]
        return sum(last) / len(last)


def add_lora(model: PreTrainedModel, lora: LoraSettings, *, seed: int) -> PeftModel:
    """``model`` with new LoRA layers, whose B is zero. Raises ``RecipeError`` where no module matches."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),  # PEFT takes floats too
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
    )
    try:
        return cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        raise RecipeError(f"lora.target_modules: {error}") from error


def train(model: PeftModel, dataset: Dataset, config: TrainConfig) -> History:
    """Train the LoRA layers of ``model`` in place. Raises ``TrainingError`` when the loss is not finite."""
    run = _Run(model, dataset, config)
    started = time.perf_counter()
    run.evaluate_base()
    run.train()
    run.history.duration_s = time.perf_counter() - started
    return run.history


class _Run:
    def __init__(self, model: PeftModel, dataset: Dataset, config: TrainConfig) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.lengths = [len(example.input_ids) for example in dataset.training]
        self.steps = plan_steps(
            self.lengths,
            batch_tokens=config.batch_tokens,
            micro_batch_tokens=config.micro_batch_tokens,
            epochs=config.epochs,
            max_steps=config.max_steps,
            seed=config.seed,
        )
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.loss = TokenLoss(model, bfloat16=uses_bfloat16(config.dtype))
        self.progress = Progress(len(self.steps))
        self.history = History()

    def evaluate_base(self) -> None:
        """Measure the held-out loss of the base, without the adapter."""
        if self.dataset.evaluation:
            with self.model.disable_adapter():
                self.history.base_eval_loss = self._eval_loss()
            self.progress.note(f"held-out loss of the base: {self.history.base_eval_loss:.3f}")

    def train(self) -> None:
        """Run all steps, with an evaluation every ``eval_every`` steps and at the end."""
        self.model.train()
        for number, micro_batches in enumerate(self.steps, start=1):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * lr_scale(number - 1, len(self.steps), self.config)
            loss = self._step(number, micro_batches)
            tokens = sum(self.lengths[index] for micro_batch in micro_batches for index in micro_batch)
            self.progress.step(number, loss=loss, tokens=tokens)
            if number == len(self.steps):
                round_to(self.parameters, SAVE_DTYPES[self.config.lora.save_dtype])
            if self.dataset.evaluation and self._is_evaluated(number):
                self._evaluate(number)
        self.model.eval()

    def _step(self, number: int, micro_batches: Sequence[MicroBatch]) -> float:
        loss = accumulate(self.loss, self.dataset.training, micro_batches)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {number} is {loss}: lower lr (it is {self.config.lr}) or raise warmup_ratio"
            )
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.history.steps.append(loss)
        self.history.num_trained_tokens += _num_trained(self.dataset.training, micro_batches)
        self.history.epochs += sum(map(len, micro_batches)) / len(self.lengths)
        return loss

    def _is_evaluated(self, number: int) -> bool:
        every = self.config.eval_every
        return number == len(self.steps) or (every is not None and number % every == 0)

    def _evaluate(self, number: int) -> None:
        self.model.eval()
        loss = self._eval_loss()
        self.model.train()
        self.history.evaluations.append((number, loss))
        self.progress.note(f"held-out loss after step {number}: {loss:.3f}")

    @torch.inference_mode()
    def _eval_loss(self) -> float:
        examples = self.dataset.evaluation
        lengths = [len(example.input_ids) for example in examples]
        batches = [
            collate([examples[index] for index in micro_batch])
            for micro_batch in by_length(lengths, range(len(examples)), self.config.micro_batch_tokens)
        ]
        return sum(float(self.loss(batch)) for batch in batches) / sum(batch.num_trained for batch in batches)


@torch.no_grad()
def round_to(parameters: Sequence[torch.nn.Parameter], dtype: torch.dtype) -> None:
    """Round float32 parameters in place to what ``dtype`` can hold, so that the published weights are the evaluated."""
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))


def accumulate(loss: TokenLoss, examples: Sequence[Encoded], micro_batches: Sequence[MicroBatch]) -> float:
    """Gradients of the mean loss over all trained tokens of the micro-batches; returns that mean."""
    num_trained = _num_trained(examples, micro_batches)
    total = 0.0
    for micro_batch in micro_batches:
        mean = loss(collate([examples[index] for index in micro_batch])) / num_trained
        mean.backward()
        total += float(mean.detach())
    return total


def _num_trained(examples: Sequence[Encoded], micro_batches: Sequence[MicroBatch]) -> int:
    return sum(examples[index].num_trained for micro_batch in micro_batches for index in micro_batch)


def lr_scale(step: int, num_steps: int, config: TrainConfig) -> float:
    """The learning rate of ``step`` (from 0) as a share of its peak: linear warm-up, then ``config.schedule``."""
    warmup = round(num_steps * config.warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    if config.schedule == "constant":
        return 1.0
    return 1 - share if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def uses_bfloat16(dtype: str) -> bool:
    """Whether to autocast to bfloat16. ``auto``: where the CPU multiplies bfloat16 natively; elsewhere it is slower."""
    if dtype != "auto":
        return dtype == "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    if torch.backends.cpu.get_cpu_capability() in (
        "DEFAULT",
        "AVX2",
    ):  # without AVX-512, or forbidden by ATEN_CPU_CAPABILITY
        return bool(capabilities.get("bf16"))
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
