"""What becomes of PEFT's other tuners under ``adapters convert``; ``test_adapters_convert`` proves each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_QV = {"target_modules": ["q_proj", "v_proj"]}
_QO = {"target_modules": ["q_proj", "o_proj"]}
_LINEARS = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


@dataclass(frozen=True)
class Outcome:
    """A tuner or variant of PEFT, and what becomes of it as LoRA.

    Exact: to float32's precision at ``rank``, where r and k are the adapter's own. Approximate: the gain has full rank,
    so the converted adapter is large; ``lost`` is the share of the adapter's change of the logits that was measured to
    be lost at the default --energy, for random weights (``noise`` off the adapter's beginning) on 64 dimensions.
    """

    config: str
    fields: Mapping[str, Any]
    how: Literal["exact", "approximate"]
    rank: str = "full"
    lost: float | None = None
    noise: float = 0.02


OUTCOMES: Mapping[str, Outcome] = {
    "LoHa": Outcome("LoHaConfig", {"r": 4, **_LINEARS}, "exact", "r²"),
    "VeRA": Outcome("VeraConfig", {"r": 8, **_QO}, "exact", "r"),
    "VB-LoRA": Outcome(
        "VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 2, **_QV}, "exact", "r"
    ),
    "Uni-LoRA": Outcome("UniLoraConfig", {"r": 4, **_QV}, "exact", "r", noise=0.1),
    "TinyLoRA": Outcome("TinyLoraConfig", {"r": 2, **_QV}, "exact", "r"),
    "PSOFT": Outcome("PsoftConfig", {"r": 8, **_QV}, "exact", "r"),
    "MiSS": Outcome("MissConfig", {"r": 4, **_QV}, "exact", "r"),
    "DeLoRA": Outcome("DeloraConfig", {"r": 4, **_QV}, "exact", "r"),
    "GraLoRA": Outcome("GraloraConfig", {"r": 8, "gralora_k": 2, **_QV}, "exact", "kr"),
    "AdaLoRA": Outcome("AdaLoraConfig", {"init_r": 6, "total_step": 10, **_QV}, "exact", "r", noise=0.3),
    "HRA": Outcome("HRAConfig", {"r": 4, **_QV}, "exact", "r"),
    "DEFT": Outcome("DeftConfig", {"r": 8, **_QV}, "exact", "r"),
    "PVeRA": Outcome("PveraConfig", {"r": 8, **_QO}, "exact", "r"),
    "LoRA, PiSSA": Outcome("LoraConfig", {"r": 4, "init_lora_weights": "pissa", **_LINEARS}, "exact", "2r"),
    "LoRA, OLoRA": Outcome("LoraConfig", {"r": 4, "init_lora_weights": "olora", **_LINEARS}, "exact", "2r"),
    "LoRA, MiCA": Outcome("LoraConfig", {"r": 4, "init_lora_weights": "mica", **_LINEARS}, "exact", "r"),
    "LoRA, KaSA": Outcome("LoraConfig", {"r": 4, "kasa_config": {}, **_LINEARS}, "exact", "2r"),
    "LoRA, BD-LoRA": Outcome(
        "LoraConfig",
        {"r": 4, "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["o_proj"], "nblocks": 2}}
        | _QO,
        "exact",
        "r",
    ),
    "LoRA, MonteCLoRA": Outcome("LoraConfig", {"r": 4, "monteclora_config": {}, **_LINEARS}, "exact", "r"),
    "LoRA, VeLoRA": Outcome("LoraConfig", {"r": 4, "velora_config": {}, **_LINEARS}, "exact", "r"),
    "LoRA, DoRA": Outcome("LoraConfig", {"r": 4, "use_dora": True, **_LINEARS}, "approximate", lost=0.011),
    "LoKr": Outcome("LoKrConfig", {"r": 4, **_LINEARS}, "approximate", lost=0.004),
    "FourierFT": Outcome(
        "FourierFTConfig", {"n_frequency": 50, "scaling": 15.0, **_QV}, "approximate", lost=0.011, noise=0.01
    ),
    "WaveFT": Outcome("WaveFTConfig", {"n_frequency": 64, "scaling": 2.5, **_QV}, "approximate", lost=0.011),
    "RandLora": Outcome("RandLoraConfig", {"r": 8, "randlora_alpha": 64, **_QV}, "approximate", lost=0.01, noise=0.01),
    "C3A": Outcome("C3AConfig", {"block_size": 16, **_QV}, "approximate", lost=0.002),
    "MiSS, bat": Outcome("MissConfig", {"r": 4, "init_weights": "bat", **_QV}, "approximate", lost=0.021, noise=0.01),
    "OFT": Outcome("OFTConfig", {"oft_block_size": 16, **_QV}, "approximate", lost=0.01, noise=0.01),
    "BOFT": Outcome("BOFTConfig", {"boft_block_size": 8, **_QV}, "approximate", lost=0.006),
    "IA3": Outcome(
        "IA3Config",
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "approximate",
        lost=0.006,
    ),
    "HiRA": Outcome("HiraConfig", {"r": 4, **_QV}, "approximate", lost=0.005),
    "SHiRA": Outcome("ShiraConfig", {"r": 4, **_QV}, "approximate", lost=0.005),
    "GLoRA": Outcome("GloraConfig", _QV, "approximate", lost=0.005),
    "RoAd": Outcome("RoadConfig", {"group_size": 16, **_QV}, "approximate", lost=0.006),
    "OSF": Outcome("OSFConfig", _QV, "approximate", lost=0.008),
    "PEANuT": Outcome("PeanutConfig", _QV, "approximate", lost=0.004),
    "Supertuning": Outcome("SupertuningConfig", _QV, "approximate", lost=0.007),
}
"""By PEFT's name, and the variant of it where it has some."""

REFUSED: Mapping[str, str] = {
    "ADAMSS": "not tried: it needs scikit-learn",
    "ADAPTION_PROMPT": "it adds to attention",
    "BEFT": "it trains biases",
    "CARTRIDGE": "it adds keys and values",
    "CPT": "it adds tokens to the prompt",
    "FROD": "it decomposes the base",
    "LILY": "modules share what they add, by a router",
    "LN_TUNING": "it trains norms",
    "MULTITASK_PROMPT_TUNING": "it adds tokens to the prompt",
    "POLY": "a router picks by task",
    "PREFIX_TUNING": "it adds keys and values",
    "PROMPT_TUNING": "it adds tokens to the prompt",
    "P_TUNING": "it adds tokens to the prompt",
    "SHADOW": "it runs a second model",
    "TRAINABLE_TOKENS": "it trains embeddings",
    "XLORA": "a router mixes adapters by token",
}
"""By ``peft_type``, and why there is no LoRA for it."""
