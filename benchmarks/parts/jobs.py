"""What is asked, decided before anything is timed: a stream of jobs that a seed determines. No HTTP, no torch."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Common words, one token each after a space in the vocabularies of most models.
WORDS: list[str] = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law
""".split()  # noqa: SIM905 - a text is read as one


@dataclass(frozen=True)
class Span:
    """A length in tokens, drawn evenly from ``least`` to ``most``."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """``125`` or ``64-256``. Raises ``ValueError`` where it is neither, or empty."""
        least, _, most = text.partition("-")
        span = cls(int(least), int(most or least))
        if not 0 < span.least <= span.most:
            raise ValueError(f"{text!r} is no length: write 125 or 64-256")
        return span

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.least, self.most)


class Mix:
    """Which of several names is asked: ``exponent`` 0 is all alike, 1 is Zipf's law, the first name most often."""

    def __init__(self, names: Sequence[str], exponent: float = 0.0) -> None:
        assert names
        self.names = names
        self._sums: list[float] = list(itertools.accumulate(rank**-exponent for rank in range(1, len(names) + 1)))

    def share(self, place: int) -> float:
        """How much of the traffic the name at ``place`` gets."""
        return (self._sums[place] - (self._sums[place - 1] if place else 0.0)) / self._sums[-1]

    def draw(self, rng: random.Random) -> str:
        place = bisect.bisect(self._sums, rng.random() * self._sums[-1])
        return self.names[min(place, len(self.names) - 1)]


@dataclass(frozen=True)
class Measure:
    """How a server counts a chat prompt of plain words: ``tokens = overhead + per_word * words``."""

    per_word: float = 1.0
    overhead: float = 0.0

    def words(self, num_tokens: int) -> int:
        return max(1, round((num_tokens - self.overhead) / self.per_word))


@dataclass(frozen=True)
class Job:
    """One request. ``prompt`` is words, or token ids; ``at`` is when it arrives, in seconds from the start."""

    model: str
    prompt: str | tuple[int, ...]
    max_tokens: int
    at: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Everything that determines the jobs.

    The first ``shared_prefix`` tokens are the same in every prompt. With ``vocab_size`` prompts are token ids below it,
    else words counted by ``measure``. ``rate`` is arrivals in a second, in Poisson's manner; without it, jobs
    arrive at once.
    """

    models: Mix
    prompt_tokens: Span
    output_tokens: Span
    shared_prefix: int = 0
    vocab_size: int | None = None
    measure: Measure = Measure()
    rate: float | None = None
    seed: int = 0

    def jobs(self) -> Iterator[Job]:
        """Jobs without end; the same for the same seed."""
        rng = random.Random(self.seed)
        shared = self._pieces(random.Random(0), self.shared_prefix)  # whatever the seed, so that a warm-up warms it
        at = 0.0
        while True:
            if self.rate is not None:
                at += rng.expovariate(self.rate)
            model, length = self.models.draw(rng), self.prompt_tokens.draw(rng)
            own = self._pieces(rng, max(0, length - self.shared_prefix))
            yield Job(model, self._prompt((shared + own)[:length]), self.output_tokens.draw(rng), at)

    def _pieces(self, rng: random.Random, count: int) -> list[int]:
        """Numbers of words, or token ids without the first sixteenth, where special tokens may be."""
        if self.vocab_size is None:
            return rng.choices(range(len(WORDS)), k=count)
        return rng.choices(range(self.vocab_size // 16, self.vocab_size - self.vocab_size // 16), k=count)

    def _prompt(self, pieces: list[int]) -> str | tuple[int, ...]:
        if self.vocab_size is not None:
            return tuple(pieces)
        return " ".join(WORDS[piece] for piece in pieces[: self.measure.words(len(pieces))])
