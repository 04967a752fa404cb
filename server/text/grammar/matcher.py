"""The state of one sequence in its grammar: which tokens may follow, and which must."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from server.sequence import ConstrainedRow


class GrammarMatcher:
    """Follows the output of one sequence; one thread at a time.

    ``pending`` are the tokens that must come next, those that the grammar forces; none where there is a choice.
    ``stopped``: the text is complete, and nothing may follow. ``failed``: a limit on work was reached.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        *,
        vocab_size: int,
        eos_id: int,
        special_ids: Set[int],
        pending: tuple[int, ...] | None = None,
    ) -> None:
        self._matcher = matcher
        self._vocab_size, self._eos_id, self._special_ids = vocab_size, eos_id, special_ids
        self.pending = self._forced() if pending is None else pending

    @property
    def failed(self) -> bool:
        return self._matcher.is_error()

    @property
    def stopped(self) -> bool:
        return self._matcher.is_stopped()

    def copy(self) -> GrammarMatcher:
        """An independent matcher in the same state."""
        return GrammarMatcher(
            self._matcher.deep_copy(),
            vocab_size=self._vocab_size,
            eos_id=self._eos_id,
            special_ids=self._special_ids,
            pending=self.pending,
        )

    def accept(self, token: int) -> bool:
        """Append a token; False, with the state ``failed``, if the grammar does not allow it."""
        accepted = self._matcher.consume_token(token)
        self.pending = self.pending[1:] if self.pending[:1] == (token,) else ()
        if accepted and not self.pending:
            self.pending = self._forced()
        return accepted

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, from the first, may follow."""
        return self._matcher.validate_tokens(list(tokens))

    def rows(self, drafts: Sequence[int], end_ids: Set[int]) -> list[ConstrainedRow | None]:
        """What may follow in the state after each number of ``drafts``, from none to all; ``end_ids`` end an answer.

        None behind a draft that ends the answer or that the grammar does not allow.
        """
        rows: list[ConstrainedRow | None] = [self._row(end_ids)]
        state = self.copy() if drafts else self
        for draft in drafts:
            if rows[-1] is None or draft in end_ids or state.stopped or not state.accept(draft):
                rows.append(None)
            else:
                rows.append(state._row(end_ids))
        return rows

    def _row(self, end_ids: Set[int]) -> ConstrainedRow:
        if self.pending:
            return ConstrainedRow(self.pending[0], None)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self.failed:  # perhaps only now; the bits are then those of the end token
            return ConstrainedRow(None, np.zeros(self._vocab_size, dtype=np.bool_))
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if self._matcher.is_accepting():
            self._allow_ends(allowed, end_ids)
        else:
            self._forbid_ends(allowed, end_ids)
        return ConstrainedRow(None, allowed)

    def _allow_ends(self, allowed: NDArray[np.bool_], end_ids: Set[int]) -> None:
        """Allow the sequence's end tokens in place of the tokenizer's, which stays where nothing else may follow."""
        allowed[self._eos_id] = False
        ends = [token for token in end_ids if token < self._vocab_size]
        allowed[ends] = True
        if not allowed.any():
            allowed[self._eos_id] = True

    def _forbid_ends(self, allowed: NDArray[np.bool_], end_ids: Set[int]) -> None:
        """Forbid the special tokens that end the sequence, which free text may hold, unless nothing else may follow."""
        others = allowed.copy()
        others[[token for token in end_ids if token in self._special_ids]] = False
        if others.any():
            allowed[:] = others

    def _forced(self) -> tuple[int, ...]:
        return tuple(self._matcher.compute_ff_tokens())
