"""Parses ``adapter_config.json`` as PEFT 0.21 writes it; fields that cannot be honoured are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import re2  # type: ignore[import-untyped]

from server.adapters.content.config_fields import CONVERT, is_active, refusal
from server.adapters.content.tensor_names import without_hooks

_CUTTING_INIT = re.compile(r"(?:pissa|olora|corda|lora_ga|loftq)(?:_.*)?", re.DOTALL)
"""Lower-case values of ``init_lora_weights`` with which PEFT changes the base's weights."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
_TASKS = (None, "", "CAUSAL_LM", "SEQ_2_SEQ_LM")
MAX_NUMBER = 1e9
MAX_TOKENS = 1 << 20
MAX_NAMES = 20_000
MAX_KEYS, MAX_KEY_CHARS, _MAX_BYTES_OF_A_KEY = 2048, 512, 1 << 16


@dataclass(frozen=True)
class Pattern:
    """``rank_pattern`` or ``alpha_pattern``: numbers by key. The first matching key in the file's order applies.

    The keys are regular expressions over module names. They are untrusted, so RE2 matches them, in time linear in the
    name. Lookarounds and backreferences, which RE2 lacks, are refused.
    https://github.com/google/re2/wiki/Syntax
    """

    keys: tuple[Any, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> Pattern:
        """Compile every key. Raises ``ValueError`` that names an invalid one."""
        if len(numbers) > MAX_KEYS:
            raise ValueError(f"it has {len(numbers)} keys; the limit is {MAX_KEYS}")
        return cls(tuple(_compile(key) for key in numbers), tuple(numbers.values()))

    def get(self, module: str, default: float) -> float:
        """The value of the first key that matches the module's name, or a suffix that follows a dot."""
        return next((value for key, value in zip(self.keys, self.values, strict=True) if key.match(module)), default)


NO_PATTERN = Pattern()


def _compile(key: str) -> Any:
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"the key {key[:40]!r}... has {len(key)} characters; the limit is {MAX_KEY_CHARS}")
    options = re2.Options()
    options.max_mem = _MAX_BYTES_OF_A_KEY
    options.log_errors = False
    try:
        return re2.compile(rf"(.*\.)?({key})$", options)  # PEFT's own, peft.utils.other.get_pattern_key
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
        raise ValueError(
            f"the key {key!r:.80} cannot be matched ({reason}): write module names, or an expression without "
            "lookarounds and backreferences"
        ) from None


@dataclass(frozen=True)
class LoRAConfig:
    """The parsed config.

    A module's scaling is ``alpha / r``, with rsLoRA ``alpha / sqrt(r)`` (Kalajdzievski 2023). ``target_modules`` is
    empty if it is a regular expression, which is never evaluated; so are ``excluded`` (``exclude_modules``) and
    ``layers`` (``layers_to_transform``). ``narrowed``: fields exclude modules from it, evaluated or not.
    ``token_indices`` are by suffix of a module's name; the key "" matches every module. The effects of ``bias`` and
    ``tied`` are in the tensors. ``trained_names`` maps modules to their names in the trained model where these differ
    from the base's; patterns match the trained model's names.
    """

    r: int
    alpha: float
    rslora: bool = False
    rank_pattern: Pattern = NO_PATTERN
    alpha_pattern: Pattern = NO_PATTERN
    dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    tied: bool = False
    target_modules: tuple[str, ...] = ()
    narrowed: bool = False
    excluded: tuple[str, ...] = ()
    layers: frozenset[int] = frozenset()
    layers_pattern: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trained_names: Mapping[str, str] = field(default_factory=dict)

    def trained_name(self, name: str) -> str:
        """The name of a module, or a parameter of it, in the trained model."""
        module, _, parameter = name.rpartition(".")
        if module in self.trained_names:
            return f"{self.trained_names[module]}.{parameter}"
        return self.trained_names.get(name, name)

    def rank(self, module: str) -> float:
        """A module's rank, which its tensors must have."""
        return self.rank_pattern.get(self.trained_name(module), self.r)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(self.trained_name(module), self.alpha)

    def scaling(self, module: str) -> float:
        alpha, rank = self.alpha_of(module), self.rank(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The tokens whose rows of an embedding or head were trained."""
        name = self.trained_name(module)
        return next((indices for end, indices in self.token_indices.items() if name.endswith(end)), ())


def parse_peft_config(data: Any) -> LoRAConfig:
    """The checked config. Raises ``ValueError`` with field, value and remedy."""
    if not isinstance(data, dict):
        raise ValueError("adapter_config.json is not a JSON object")
    _check_kind(data)
    _check_init(data)
    for name, value in data.items():
        if why := refusal(name, value):
            raise ValueError(f"adapter_config.json: {name} = {value!r:.80} is not supported: {why}")
    if data.get("use_dora") and data.get("lora_bias"):
        raise ValueError("adapter_config.json: use_dora and lora_bias exclude each other in PEFT: the file is damaged")
    patterns = _layer_patterns(data)
    return LoRAConfig(
        r=_number(data, "r", whole=True),
        alpha=_number(data, "lora_alpha"),
        rslora=_flag(data, "use_rslora"),
        rank_pattern=_pattern(data, "rank_pattern", whole=True),
        alpha_pattern=_pattern(data, "alpha_pattern"),
        dora=_flag(data, "use_dora"),
        lora_bias=_flag(data, "lora_bias"),
        bias=_bias(data),
        tied=_flag(data, "ensure_weight_tying"),
        target_modules=_listed(data, "target_modules"),
        narrowed=is_active(data.get("exclude_modules")) or data.get("layers_to_transform") is not None,
        excluded=_listed(data, "exclude_modules"),
        layers=frozenset() if patterns is None else _layers(data),
        layers_pattern=patterns or (),
        target_parameters=_names(data, "target_parameters"),
        modules_to_save=_names(data, "modules_to_save"),
        token_indices=_token_indices(data),
    )


def _check_kind(data: Mapping[str, Any]) -> None:
    if data.get("peft_type") is None:
        found = "is None" if "peft_type" in data else "is missing"
        raise ValueError(f'adapter_config.json: peft_type {found}: if the adapter is a LoRA, add "peft_type": "LORA"')
    if _enum(data.get("peft_type")) != "LORA":
        raise ValueError(
            f"adapter_config.json: peft_type is {data.get('peft_type')!r:.40}: only LORA is served; {CONVERT}"
        )
    if _enum(data.get("task_type")) not in _TASKS:  # a task names the head, which the tensors show anyway
        raise ValueError(
            f"adapter_config.json: task_type is {data['task_type']!r:.40}: only CAUSAL_LM adapters are served"
        )


def _enum(value: Any) -> Any:
    """A member of a PEFT enumeration in capitals; some tools write its Python name or lower case."""
    return value.rpartition(".")[2].upper() if isinstance(value, str) else value


def _check_init(data: Mapping[str, Any]) -> None:
    init = data.get("init_lora_weights", True)
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        return
    if not isinstance(init, str) or not _CUTTING_INIT.fullmatch(init.lower()):
        raise ValueError(
            f"adapter_config.json: init_lora_weights is {init!r:.40}, which is unknown and may change the base's "
            "weights: set it to true if it does not, else save the adapter with "
            "path_initial_model_for_weight_conversion"
        )
    if init.lower() == "loftq":
        remedy = "train it again with another init_lora_weights"
    else:
        remedy = "save the adapter with path_initial_model_for_weight_conversion, so that it fits the unchanged base"
        remedy += f", or {CONVERT}"
    raise ValueError(
        f"adapter_config.json: init_lora_weights is {init!r:.40}, which changes the base's own weights; {remedy}"
    )


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"adapter_config.json: {name} is {value!r:.40}: it must be true or false")


def _bias(data: Mapping[str, Any]) -> Any:
    value = "none" if data.get("bias") is None else data["bias"]
    if value not in ("none", "all", "lora_only"):
        raise ValueError(f"adapter_config.json: bias is {value!r:.40}: it must be 'none', 'all' or 'lora_only'")
    return value


def _number(data: Mapping[str, Any], name: str, *, whole: bool = False) -> Any:
    return _checked(data.get(name, 8), name, whole=whole)


def _checked(value: Any, name: str, *, whole: bool) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < MAX_NUMBER or (whole and value != int(value)):
        kind = "integer" if whole else "number"
        raise ValueError(f"adapter_config.json: {name} is {value!r:.40}: it must be a positive {kind}")
    return int(value) if whole else value


def _pattern(data: Mapping[str, Any], name: str, *, whole: bool = False) -> Pattern:
    value = data.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"adapter_config.json: {name} is {value!r:.80}: it must be an object")
    try:
        pattern = Pattern.of(value)
    except ValueError as error:
        raise ValueError(f"adapter_config.json: {name}: {error}") from None
    numbers = [_checked(number, f"{name}[{key!r:.80}]", whole=whole) for key, number in value.items()]
    return replace(pattern, values=tuple(numbers))


def _names(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = data.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"adapter_config.json: {name} is {value!r:.80}: it must be a list of names")
    if len(value) > MAX_NAMES:
        raise ValueError(f"adapter_config.json: {name} has {len(value)} names; the limit is {MAX_NAMES}")
    return tuple(dict.fromkeys(value))


def _listed(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of module names without training wrappers; empty if the field is a regular expression."""
    if isinstance(data.get(name), str) or not is_active(data.get(name)):
        return ()
    return tuple(dict.fromkeys(without_hooks(module) for module in _names(data, name)))


def _layers(data: Mapping[str, Any]) -> frozenset[int]:
    """The numbers of the layers with a delta; empty for all layers."""
    value = data.get("layers_to_transform")
    if not is_active(value):
        return frozenset()
    listed = [value] if type(value) is int else value
    if not isinstance(listed, list) or not all(type(number) is int and 0 <= number < 1 << 31 for number in listed):
        raise ValueError(
            f"adapter_config.json: layers_to_transform is {value!r:.80}: it must be a list of layer numbers"
        )
    return frozenset(listed)


def _layer_patterns(data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the module lists that hold the layers; None if one is a regular expression or no string."""
    value = data.get("layers_pattern")
    listed = [value] if isinstance(value, str) and value else value or []
    plain = isinstance(listed, list) and all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in listed)
    return tuple(listed) if plain and len(listed) <= MAX_NAMES else None


def _token_indices(data: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    value = data.get("trainable_token_indices")
    if value is None:
        return {}
    by_module = value if isinstance(value, dict) else {"": value}
    return {module: _indices(indices) for module, indices in by_module.items()}


def _indices(value: Any) -> tuple[int, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and 0 < len(value) <= MAX_TOKENS
    is_ids = is_list and all(type(number) is int and 0 <= number < 1 << 31 for number in value)
    if not is_ids or len(set(value)) != len(value):
        raise ValueError(
            f"adapter_config.json: trainable_token_indices has {value!r:.80}: it must be a list of different token ids"
        )
    return tuple(value)
