"""Token ids in responses (vLLM's ``return_token_ids``), and what was recorded of each choice."""

from __future__ import annotations

from server.api.active_request import ActiveRequest, TokenRecord
from server.api.formats.wire import Json


def record_of(request: ActiveRequest, index: int) -> TokenRecord:
    record = request.choices[index].record
    assert record is not None, "the request did not ask for tokens"
    return record


def prompt_record(request: ActiveRequest, index: int) -> TokenRecord:
    """The record with the prompt of a choice: its own in a stream, else that of the prompt's first choice."""
    number = request.body.num_candidates
    return record_of(request, index if request.body.stream else index // number * number)


class ChunkTokenIds:
    """The token ids of each chunk of a stream: those since the last chunk of the choice; the prompt's in the first."""

    def __init__(self, request: ActiveRequest) -> None:
        self._request = request
        self._num_shown: dict[int, int] = {}

    def prompt(self, index: int) -> list[int]:
        """The prompt of a choice."""
        return list(self._request.prompt_ids[index // self._request.body.num_candidates])

    def of_chunk(self, index: int) -> Json:
        tokens = record_of(self._request, index).answer
        shown = self._num_shown.get(index, 0)
        self._num_shown[index] = len(tokens)
        return {"token_ids": [token.id for token in tokens[shown:]]}

    def of_completion_chunk(self, index: int) -> Json:
        """Completions have the prompt's ids in the choice."""
        prompt = {} if index in self._num_shown else {"prompt_token_ids": self.prompt(index)}
        return {**prompt, **self.of_chunk(index)}
