"""The loss of a batch, with logits only at trained positions.

The head is the most expensive layer of a small model (with a vocabulary of 152,000 more than a quarter of the forward
pass), and most positions of a conversation have no loss.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from trainer.batches import TrainingBatch
from trainer.masking import IGNORED


class TokenLoss:
    """The summed cross entropy of a batch's trained positions, with ``bfloat16`` under bfloat16 autocast.

    Where the base's logits are not simply the head of its hidden states (a soft cap, a scale), all logits are computed.
    """

    def __init__(self, model: PeftModel, *, bfloat16: bool) -> None:
        causal = cast(PreTrainedModel, model.get_base_model())
        self._causal = causal
        self._backbone: nn.Module = getattr(causal, causal.base_model_prefix, causal)
        self._head: nn.Module | None = causal.get_output_embeddings()
        self._bfloat16 = bfloat16
        self.skips_untrained = self._head_is_all()

    def __call__(self, batch: TrainingBatch) -> torch.Tensor:
        """The sum, in nats; divide by the trained tokens of the whole step."""
        trained = batch.targets != IGNORED  # [rows, length]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            logits = self._logits(batch.input_ids, trained)  # [trained positions, vocabulary]
        return F.cross_entropy(logits.float(), batch.targets[trained], reduction="sum")

    def _logits(self, input_ids: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        if not self.skips_untrained or self._head is None:
            return full_logits(self._causal, input_ids)[trained]
        hidden: torch.Tensor = self._backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return torch.as_tensor(self._head(hidden[trained]))

    @torch.no_grad()
    def _head_is_all(self) -> bool:
        """Whether backbone and head give the model's own logits, to the bit."""
        if self._head is None or self._backbone is self._causal:
            return False
        training = self._causal.training
        self._causal.eval()  # dropout would make any two passes differ
        probe = torch.arange(8).unsqueeze(0)  # [1, 8]
        hidden = self._backbone(input_ids=probe, use_cache=False).last_hidden_state
        same = torch.equal(self._head(hidden), full_logits(self._causal, probe))
        self._causal.train(training)
        return same


def full_logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits at every position, [rows, length, vocabulary]."""
    return torch.as_tensor(model(input_ids=input_ids, use_cache=False).logits)
