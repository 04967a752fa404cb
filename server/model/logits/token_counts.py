"""Counts of tokens, updated as a sequence grows."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch


class TokenCounts:
    """Distinct tokens and their counts; ``counted`` are there from the start."""

    def __init__(self, counted: Iterable[int] = ()) -> None:
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.zeros(64, np.int64), np.zeros(64, np.float32)
        self._num_outputs = 0
        for token in counted:
            self._count(token)

    def of(
        self, output_ids: SequenceOf[int], drafts: SequenceOf[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [distinct] and their counts [distinct] with an output so far, and with drafts behind it.

        Only outputs since the last call are read.
        """
        for token in output_ids[self._num_outputs :]:
            self._count(token)
        self._num_outputs = len(output_ids)
        for token in drafts:
            self._count(token)
        num_distinct = len(self._places)
        ids, counts = self._ids[:num_distinct].copy(), self._counts[:num_distinct].copy()
        for token in reversed(drafts):
            self._uncount(token)
        return torch.from_numpy(ids).to(device), torch.from_numpy(counts).to(device)

    def _count(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = np.pad(self._ids, (0, place)), np.pad(self._counts, (0, place))
        self._ids[place] = token
        self._counts[place] += 1

    def _uncount(self, token: int) -> None:
        """Undo the latest ``_count``; a token that it added had the last place."""
        place = self._places[token]
        self._counts[place] -= 1
        if self._counts[place] == 0:
            del self._places[token]
