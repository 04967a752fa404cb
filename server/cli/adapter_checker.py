"""A base in memory, and adapter folders checked against it as the server does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cpu_kernels.cores import default_threads
from server.adapters.content.diagnostics import DiagnosticReport, diagnose
from server.adapters.content.manifest import AdapterPolicy
from server.cli.folders import policy_of
from server.errors import AdapterRejected
from server.lora.weights import LoRAWeights
from server.model.loader import Base, load_base
from server.settings import Settings
from server.text.prompt import PromptRenderer


@dataclass(frozen=True)
class AdapterChecker:
    """Checks folders; ``modules`` are the base's."""

    base: Base
    policy: AdapterPolicy
    prompts: PromptRenderer
    modules: Mapping[str, nn.Module]

    @classmethod
    def load(cls, settings: Settings, *, dtype: str = "float32") -> AdapterChecker:
        """Load the settings' base on the CPU. Raises ``StartError``."""
        torch.set_num_threads(settings.threads or default_threads())
        base = load_base(
            settings.base_model,
            name=settings.base_name,
            device="cpu",
            dtype=dtype,
            max_model_len=settings.max_model_len,
        )
        prompts = PromptRenderer(base.tokenizer, vocab_size=base.vocab_size)
        return cls(base, policy_of(settings), prompts, dict(base.model.named_modules(remove_duplicate=False)))

    def close(self) -> None:
        self.base.close()

    def check(self, path: Path, *, name: str | None = None) -> tuple[DiagnosticReport, LoRAWeights | None]:
        """The report on a folder, under its own name or ``name``, and its weights if the server would serve it."""
        name = name or path.absolute().name
        report = diagnose(path, self.base.signature, self.policy, name=name, check_defaults=self.prompts.check_defaults)
        if report.manifest is None or report.problems:
            return report, None
        try:
            return report, LoRAWeights.of(report.manifest, self.modules)
        except AdapterRejected as error:
            report.problems.append(error.reason)
            return report, None
