"""Trains ``micro`` from scratch on a CPU; stops and resumes at any step.

    python -m trainer.micro.pretrain tokenizer --books FOLDER --out runs/micro
    python -m trainer.micro.pretrain train     --books FOLDER --out runs/micro
    python -m trainer.micro.pretrain export    --out runs/micro --to micro_base

Matrices of the hidden layers learn by Muon (Jordan et al. 2024), the rest by AdamW. The learning rate warms up, stays,
and falls linearly to zero (warmup-stable-decay, Hu et al. 2024) while only answers are trained; an anneal on copying
and facts follows.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.masking import IGNORED
from trainer.micro.corpus import BookTokens, Mixture, tokenizer_texts
from trainer.micro.tokenizer import END_OF_TEXT, VOCAB_SIZE, read_tokenizer, save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class PretrainConfig:
    """How ``micro`` is trained. Lengths are in tokens; a step is always ``tokens_per_step``."""

    seed: int = 1
    steps: int = 2250
    warmup_steps: int = 100
    decay_share: float = 0.3
    anneal_steps: int = 900
    anneal_peak: float = 0.5
    tokens_per_step: int = 8192
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    save_every: int = 200
    log_every: int = 20

    def lr_scale(self, step: int) -> float:
        """The learning rate at ``step`` as a share of its peak."""
        if self.annealing(step):
            return self.anneal_peak * (self.num_steps - step) / self.anneal_steps
        left = (self.steps - step) / max(1, int(self.steps * self.decay_share))
        return min(1.0, (step + 1) / self.warmup_steps, left)

    @property
    def num_steps(self) -> int:
        """All steps, those of the anneal included."""
        return self.steps + self.anneal_steps

    def annealing(self, step: int) -> bool:
        """Whether the last part has begun: half the rate again, falling to zero, on copying and facts above all."""
        return step >= self.steps

    def decaying(self, step: int) -> bool:
        """Whether the learning rate is falling, and only answers are trained."""
        return step >= self.steps * (1 - self.decay_share)

    def row_length(self, step: int) -> int:
        """Mostly 256, every tenth step 1,024, and every fortieth the whole context."""
        return 2048 if step % 40 == 39 else 1024 if step % 10 == 9 else 256

    def book_share(self, step: int) -> float:
        """The share of rows that are prose; long rows are all prose until the decay."""
        if self.annealing(step):
            return 0.1
        if self.row_length(step) > 256:
            return 0.5 if self.decaying(step) else 0.8
        return 0.15 if self.decaying(step) else 0.35


def micro_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: Llama's, 11.0M parameters, embeddings tied."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def optimizers(model: LlamaForCausalLM, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


class Pretraining:
    """The run in a folder: ``checkpoint.pt``, ``log.jsonl`` and the tokenizer's files."""

    def __init__(self, folder: Path, books: Path, config: PretrainConfig) -> None:
        self.folder, self.config = folder, config
        self.tokenizer = read_tokenizer(folder / "tokenizer")
        self.mixture = Mixture(self.tokenizer, BookTokens.read(books, self.tokenizer), config.seed)
        torch.manual_seed(config.seed)
        self.model = LlamaForCausalLM(micro_config(self.tokenizer))
        self.optimizers = optimizers(self.model, config)
        self.step = 0
        self._stopping = False
        self._losses = {length: torch.compile(self._loss, dynamic=False) for length in (256, 1024, 2048)}

    def run(self) -> None:
        """Train to the end, or until SIGINT or SIGTERM; either way the last step is in the checkpoint."""
        self._resume()
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        since, losses = time.perf_counter(), list[float]()
        while self.step < self.config.num_steps and not self._stopping:
            losses.append(self._train_step())
            self.step += 1
            if self.step % self.config.log_every == 0:
                rate = len(losses) * self.config.tokens_per_step / (time.perf_counter() - since)
                self._log(sum(losses) / len(losses), rate)
                since, losses = time.perf_counter(), []
            if self.step % self.config.save_every == 0:
                self._save()
        self._save()

    def _loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden).view(-1, VOCAB_SIZE).float()
        return F.cross_entropy(logits, labels.view(-1), ignore_index=IGNORED)

    def _train_step(self) -> float:
        config, step = self.config, self.step
        length = config.row_length(step)
        rows = config.tokens_per_step // length
        ids, labels = self.mixture.batch(
            step,
            rows=rows,
            length=length,
            book_share=config.book_share(step),
            answers_only=config.decaying(step),
            anneal=config.annealing(step),
        )
        self.model.set_attn_implementation("eager" if length == 256 else "sdpa")
        with torch.autocast("cpu", torch.bfloat16):
            loss = self._losses[length](ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, (config.muon_lr, config.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * config.lr_scale(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.inference_mode()
    def held_out_loss(self) -> float:
        """Mean loss in nats a token over 64 windows of the books' held-out ends."""
        ids = torch.tensor(self.mixture.books.held_out[: 64 * 257].astype("int64")).view(64, 257)
        with torch.autocast("cpu", torch.bfloat16):
            return float(self._loss(ids[:, :-1], ids[:, 1:].contiguous()))

    def _log(self, loss: float, rate: float) -> None:
        line: dict[str, Any] = {"step": self.step, "loss": round(loss, 4), "tokens_per_s": round(rate)}
        if self.step % self.config.save_every == 0:
            line["held_out_loss"] = round(self.held_out_loss(), 4)
        line["minutes_left"] = round((self.config.num_steps - self.step) * self.config.tokens_per_step / rate / 60)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.folder / "checkpoint.partial"
        torch.save(state, partial)
        partial.rename(self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        print(f"resumed at step {self.step}", flush=True)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._stopping = True


def make_tokenizer(books: Path, folder: Path) -> None:
    """Learn the tokenizer from the books and 30,000 conversations, and save it under the run's folder."""
    tokenizer = train_tokenizer(tokenizer_texts(books, num_conversations=30_000, seed=0))
    save_tokenizer(tokenizer, folder / "tokenizer")


def export(folder: Path, target: Path) -> None:
    """Write the base as transformers reads it: bf16 safetensors, config, generation config, tokenizer."""
    tokenizer = read_tokenizer(folder / "tokenizer")
    model = LlamaForCausalLM(micro_config(tokenizer))
    model.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["model"])
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=[model.config.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.4,
        top_p=0.9,
    )
    model.bfloat16().save_pretrained(target)
    save_tokenizer(tokenizer, target)


def main() -> None:
    """The three commands of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tokenizer", "train", "export"))
    parser.add_argument("--books", type=Path, help="folder of plain-text books")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder: checkpoint, log, tokenizer")
    parser.add_argument("--to", type=Path, help="export: where the finished base goes")
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps, help="steps before the anneal")
    options = parser.parse_args()
    if options.command == "export":
        export(options.out, options.to)
    elif options.command == "tokenizer":
        make_tokenizer(options.books, options.out)
    else:
        Pretraining(options.out, options.books, PretrainConfig(steps=options.steps)).run()


if __name__ == "__main__":
    main()
