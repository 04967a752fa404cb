"""A recipe's sources as token ids with labels, split into training and evaluation. Problems are reported together."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from adapter_format.messages import with_system_prompt
from trainer.config import GeneratorSource, MessagesSource, Source, TextSource, TrainConfig
from trainer.conversations import Located, generated_conversations, read_conversations
from trainer.errors import DataError
from trainer.masking import IGNORED, Encoded, MaskingError, encode_conversation
from trainer.passages import Plain, read_passages

MAX_EVALUATED = 200


@dataclass(frozen=True)
class Dataset:
    """Training and evaluation examples; ``evaluation`` has at most ``MAX_EVALUATED`` of the held out, evenly spaced."""

    training: list[Encoded]
    evaluation: list[Encoded]
    num_held_out: int
    num_duplicates: int
    num_truncated: int

    @property
    def digest(self) -> str:
        """SHA-256 over ids and labels of the training examples: int64 each, every list preceded by its length."""
        digest = hashlib.sha256()
        for example in self.training:
            for ids in (example.input_ids, example.labels):
                digest.update(array("q", [len(ids), *ids]).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def summary(self) -> str:
        trained = sum(example.num_trained for example in self.training)
        total = sum(len(example.input_ids) for example in self.training)
        return (
            f"{len(self.training)} examples, {total} tokens ({trained} trained), {self.num_held_out} held out; "
            f"{self.num_duplicates} duplicates dropped, {self.num_truncated} cut to max_length"
        )


def load_dataset(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Read, encode, deduplicate and split all sources. Raises ``DataError`` with all problems of all of them."""
    loader = _Loader(config, tokenizer)
    for number, source in enumerate(config.data):
        loader.add(source, f"data[{number}]")
    return loader.finish()


@dataclass
class _Loader:
    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    training: list[Encoded] = field(default_factory=list)
    held_out: list[Encoded] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    num_duplicates: int = 0
    num_truncated: int = 0

    def add(self, source: Source, label: str) -> None:
        """Read one source. Text is split by position in each file, conversations at random."""
        if isinstance(source, TextSource):
            for path in self._files(source.path, ".txt"):
                passages = read_passages(path, source, self.tokenizer, seed=self.config.seed, problems=self.problems)
                self._split(self._accepted(self._encode(passage) for passage in passages))
            return
        if isinstance(source, GeneratorSource):
            conversations: Iterable[Located] = generated_conversations(source.generator, problems=self.problems)
        else:
            conversations = self._read(source)
        examples = self._accepted(self._encode(conversation) for conversation in conversations)
        random.Random(f"split:{self.config.seed}:{label}").shuffle(examples)
        self._split(examples)

    def finish(self) -> Dataset:
        if not self.problems and not self.training:
            self.problems.append("the data has no example to train on")
        if self.problems:
            raise DataError(self.problems)
        stride = max(1, -(-len(self.held_out) // MAX_EVALUATED))
        return Dataset(
            self.training, self.held_out[::stride], len(self.held_out), self.num_duplicates, self.num_truncated
        )

    def _read(self, source: MessagesSource) -> Iterable[Located]:
        for path in self._files(source.path, ".jsonl"):
            yield from read_conversations(path, problems=self.problems)

    def _files(self, path: Path, suffix: str) -> list[Path]:
        path = (self.config.data_root or Path()) / path
        files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            self.problems.append(f"{path}: no such file, and no folder with {suffix} files; check path and data_root")
            return []
        return files

    def _encode(self, example: Located | Plain) -> tuple[str, Encoded | None]:
        """The example's place and ids; None and a problem where the template refuses it."""
        if isinstance(example, Plain):
            ids = self.tokenizer(example.text)["input_ids"]  # with special tokens, as for a plain completion
            return example.place, Encoded(ids, [IGNORED, *ids[1:]])
        turns = with_system_prompt(example.messages, self.config.system_prompt)
        try:
            return example.place, encode_conversation(self.tokenizer, turns, tools=example.tools)
        except (MaskingError, TemplateError, ValueError, TypeError, LookupError) as error:
            self.problems.append(f"{example.place}: {error}")
            return example.place, None

    def _accepted(self, examples: Iterable[tuple[str, Encoded | None]]) -> list[Encoded]:
        """The examples that are no duplicates, cut to ``max_length``; one without a trained token is a problem."""
        accepted: list[Encoded] = []
        limit = self.config.max_length
        for place, example in examples:
            if example is None:
                continue
            self.num_truncated += len(example.input_ids) > limit
            cut = Encoded(example.input_ids[:limit], example.labels[:limit])
            key = hashlib.sha256(array("q", cut.input_ids + cut.labels).tobytes()).digest()
            if cut.num_trained == 0:
                self.problems.append(
                    f"{place}: no trained token within max_length={limit}; shorten the prompt or raise it"
                )
            elif key in self.seen:
                self.num_duplicates += 1
            else:
                self.seen.add(key)
                accepted.append(cut)
        return accepted

    def _split(self, examples: Sequence[Encoded]) -> None:
        """Hold out the last ``eval_share`` of the examples: at least one of ten or more, none of fewer."""
        share = self.config.eval_share
        num_held_out = max(1, round(len(examples) * share)) if share > 0 and len(examples) >= 10 else 0
        border = len(examples) - num_held_out
        self.training += examples[:border]
        self.held_out += examples[border:]
