"""A process that does to adapter folders whatever people and programs do to them, and writes down what it did."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from server.adapters.versions import Pin, VersionStore

NAMES = tuple(f"actor-{number}" for number in range(12))
NUM_CONTENTS = 30
SETTLE, GRACE, KEEP = 0.2, 1.5, 3
SLACK = 5.0
"""Seconds that a folder put in place may take until it is served, on a busy machine."""
KEY = "storm-key-0123456789"
WEIGHTS = "adapter_model.safetensors"
Note = tuple[float, str, str, str]
"""When, which name, what, and which content."""


@dataclass
class FaultInjector:
    """Does to an adapter folder what people and programs do to one, in a process of its own, and notes it.

    A note is ``gone`` before a name's folder is taken away for good, ``spoiled`` before its files are written or
    truncated in place, ``whole`` when it holds a content again.
    """

    folder: Path
    contents: Path
    state: Path
    url: str
    rng: random.Random
    notes: list[Note] = field(default_factory=list)
    holds: dict[str, str] = field(default_factory=dict)
    resident: str = NAMES[0]
    num_done: Counter[str] = field(default_factory=Counter)

    def note(self, name: str, what: str, content: str = "") -> None:
        """Remember what is about to happen to a name, or, of ``whole``, what just has."""
        self.notes.append((time.time(), name, what, content))
        self.holds.pop(name, None)
        if what == "whole":
            self.holds[name] = content

    def content(self) -> str:
        """Any content."""
        return f"content-{self.rng.randrange(NUM_CONTENTS)}"

    def rename_into_place(self, name: str) -> None:
        """Written beside, then put in the place of what was there."""
        content, fresh, old = self.content(), self.folder / ".fresh", self.folder / ".old"
        shutil.copytree(self.contents / content, fresh)
        if (self.folder / name).exists():
            (self.folder / name).rename(old)
        fresh.rename(self.folder / name)
        self.note(name, "whole", content)
        shutil.rmtree(old, ignore_errors=True)

    def copy_slowly(self, name: str) -> None:
        """``cp -r``, file by file and piece by piece, over what is there; a pause may be as long as the settling.

        The weights are emptied first and completed last: a folder of old weights and a new config would be an adapter.
        """
        content, path = self.content(), self.folder / name
        self.note(name, "spoiled")
        path.mkdir(exist_ok=True)
        with open(path / WEIGHTS, "wb") as target:
            for file in ("quickchange.json", "adapter_config.json"):
                self.pause()
                (path / file).write_bytes((self.contents / content / file).read_bytes())
            data = (self.contents / content / WEIGHTS).read_bytes()
            for piece in range(0, len(data), len(data) // 3):
                self.pause()
                target.write(data[piece : piece + len(data) // 3])
                target.flush()
        self.note(name, "whole", content)

    def truncate(self, name: str) -> None:
        """Cut the weights off somewhere and leave it at that."""
        path = self.folder / name / WEIGHTS
        if path.exists():
            self.note(name, "spoiled")
            os.truncate(path, self.rng.randrange(path.stat().st_size))

    def rename(self, name: str) -> None:
        """To a name that is free."""
        free = [one for one in NAMES if not (self.folder / one).exists()]
        if free and name in self.holds:
            other, content = self.rng.choice(free), self.holds[name]
            self.note(name, "gone")
            (self.folder / name).rename(self.folder / other)
            self.note(other, "whole", content)

    def exchange(self, name: str) -> None:
        """Two folders' names."""
        other = self.rng.choice(NAMES)
        if other != name and name in self.holds and other in self.holds:
            mine, theirs = self.holds[name], self.holds[other]
            (self.folder / name).rename(self.folder / ".exchanged")
            (self.folder / other).rename(self.folder / name)
            (self.folder / ".exchanged").rename(self.folder / other)
            self.note(name, "whole", theirs)
            self.note(other, "whole", mine)

    def take_away_and_put_back(self, name: str) -> None:
        """Within the grace."""
        if (self.folder / name).exists():
            (self.folder / name).rename(self.folder / ".away")
            time.sleep(self.rng.uniform(0, GRACE / 2))
            (self.folder / ".away").rename(self.folder / name)

    def delete(self, name: str) -> None:
        """Remove the folder, file by file."""
        if (self.folder / name).exists():
            self.note(name, "gone")
            shutil.rmtree(self.folder / name)

    def pin(self, name: str) -> None:
        """Through the small files: at the version before, or in memory; one name at a time, more would fill it."""
        store = VersionStore(self.state, keep=KEEP)
        kept = store.versions(name)
        if len(kept) > 1 and self.rng.random() < 0.7:
            store.set_pin(name, Pin(kept[-2].digest))
        else:
            store.set_pin(self.resident, Pin())
            store.set_pin(name, Pin(resident=True))
            self.resident = name

    def unpin(self, name: str) -> None:
        """Through the small files."""
        VersionStore(self.state, keep=KEEP).set_pin(name, Pin())

    def administrate(self, name: str) -> None:
        """Pin, roll back and unpin over HTTP."""
        headers = {"authorization": f"Bearer {KEY}"}
        versions = httpx.get(f"{self.url}/v1/models/{name}", timeout=60).json().get("versions") or ["0000"]
        for route, body in (("pin", {"version": versions[-1]}), ("rollback", None), ("unpin", None)):
            answer = httpx.post(f"{self.url}/v1/models/{name}/{route}", json=body, headers=headers, timeout=60)
            assert answer.status_code in (200, 400, 404), answer.text
            self.pause()

    def pause(self) -> None:
        """A moment, at most somewhat longer than a folder takes to settle."""
        time.sleep(self.rng.uniform(0, 1.5 * SETTLE))

    def make(self, seconds: float) -> None:
        """One thing after the other, until the time is over; then leave every folder whole and nothing pinned."""
        deeds: list[Callable[[str], None]] = [
            self.rename_into_place, self.rename_into_place, self.copy_slowly, self.copy_slowly, self.truncate,
            self.rename, self.exchange, self.take_away_and_put_back, self.delete, self.pin, self.pin, self.unpin,
            self.administrate,
        ]  # fmt: skip
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            deed, name = self.rng.choice(deeds), self.rng.choice(NAMES)
            deed(name)
            self.num_done[deed.__name__] += 1
            time.sleep(self.rng.uniform(0, SETTLE))
        for name in NAMES:
            self.unpin(name)
            if name not in self.holds and (self.folder / name).exists():
                self.rename_into_place(name)


def inject_faults(
    folder: Path, contents: Path, state: Path, url: str, notes: Path, *, seconds: float, seed: int
) -> None:
    """The other process. What it did is left in the file ``notes``."""
    fault_injection = FaultInjector(folder, contents, state, url, random.Random(seed))
    for name in NAMES[:-3]:
        fault_injection.rename_into_place(name)
    fault_injection.make(seconds)
    left = {"notes": fault_injection.notes, "holds": fault_injection.holds, "done": fault_injection.num_done}
    notes.write_text(json.dumps(left))


def may_be_missing(name: str, since: float, until: float, notes: Sequence[Note]) -> bool:
    """Whether a name may have been a 404 at some time between these two.

    From when its folder was taken away, until the next one has been whole and left alone for ``SLACK`` seconds.
    """
    missing_since: float | None = 0.0
    own = [note for note in notes if note[1] == name]
    for (at, _, what, _), after in itertools.zip_longest(own, own[1:]):
        if what == "gone" and missing_since is None:
            missing_since = at
        ready = at + SLACK
        if what == "whole" and (after is None or after[0] > ready) and missing_since is not None:
            if missing_since <= until and since <= ready:
                return True
            missing_since = None
    return missing_since is not None and missing_since <= until
