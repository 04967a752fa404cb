"""What a sequence's keys and values depend on: whose it is, its adapters with their scales, and its tokens."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from server.sequence import AdapterUse, Sequence

_TOKEN = array("I").itemsize
_CHUNK = 256 * _TOKEN


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a sequence, as bytes, so that long ones compare at the speed of memory.

    Keys and values at a position depend on all tokens up to it and on the adapters' weights, which ``owner`` names by
    their digests: an adapter that was replaced is another one. The scope in it keeps strangers' sequences apart.
    """

    owner: tuple[bytes, tuple[AdapterUse, ...]]
    ids: bytes

    @classmethod
    def of(cls, sequence: Sequence, length: int) -> Prefix:
        """The first ``length`` tokens of a sequence."""
        return cls((sequence.scope, sequence.adapters), array("I", sequence.ids(0, length)).tobytes())

    def __len__(self) -> int:
        """Tokens in it."""
        return len(self.ids) // _TOKEN

    def common(self, other: Prefix) -> int:
        """How many tokens both begin with; 0 where the owners differ."""
        if self.owner != other.owner:
            return 0
        mine, others, start = self.ids, other.ids, 0
        most = min(len(mine), len(others))
        while start < most and mine[start : start + _CHUNK] == others[start : start + _CHUNK]:
            start += _CHUNK
        end = min(start + _CHUNK, most)
        if start >= end:
            return most // _TOKEN
        differing = int.from_bytes(mine[start:end], "little") ^ int.from_bytes(others[start:end], "little")
        if not differing:
            return most // _TOKEN
        lowest = (differing & -differing).bit_length() - 1  # the first bit at which they differ
        return (start + lowest // 8) // _TOKEN


NOTHING = Prefix((b"", ()), b"")
