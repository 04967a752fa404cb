"""Writes docs/models.md: ``python -m tests.model.models_table``."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.model.architectures import REFUSED, SERVED, verdict

PATH = Path(__file__).parents[2] / "docs" / "models.md"

_HEAD = """\
# Which base models are served

<!-- Written by `python -m tests.model.models_table`; a test keeps it true. Do not edit by hand. -->

The server runs the modelling code of transformers on flat batches: the rows of all sequences, concatenated in one row.
Most architectures compute correct results that way. Some do not, and give wrong results without an error. So at every
start a small random copy of the base's config is run by the stock code and by the server's, and the base is refused if
the logits differ
(`server/model/admission.py`; a second or less). No list of architectures is used: one that is not in this table is
tested like the others. The table holds the results with the versions that the project is tested with.

- **Length:** the maximum length of a sequence is `max_position_embeddings` of the base's config, or the setting
  `max_model_len` if that is less.
- **RoPE that depends on length** (`longrope`, `dynamic`): the frequencies are chosen once at start, for
  `max_model_len`. The stock code chooses them by the longest sequence in the batch. So with a `max_model_len` beyond
  `original_max_position_embeddings` of a Phi-3, short prompts use the long factors too;
  set `max_model_len` to that length or less to use the short ones.
- **Adapters** may change every linear layer, norm and router that sees all rows of the batch, the embedding, the head,
  and the parameters of a mixture's experts. Linear layers inside an expert see only some rows: an adapter on them is
  refused.

| architecture | `model_type` | served | reason |
|---|---|---|---|
"""


def table() -> str:
    """The page."""
    rows = []
    for name in sorted([*SERVED, *REFUSED], key=str.casefold):
        said = verdict(name)
        served = "yes" if said.reason is None else "no"
        rows.append(f"| {name} | `{said.model_type}` | {served} | {said.short_reason} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(table(), encoding="utf-8")
