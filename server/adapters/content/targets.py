"""Which modules PEFT gives a delta by the lists in ``adapter_config.json``: it ignores the tensors of all others.

``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern`` mean what they mean in
``check_target_module_exists`` of peft.tuners.tuners_utils. An expression among them is never evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from server.adapters.content.module_plan import ModulePlan
from server.adapters.content.parts import target_parameters_of
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.signature import BaseSignature
from server.adapters.content.words import first

_MAX_CHARS = 1024
"""Characters of a trained name that is looked at; no model has longer ones."""


def target_problems(parts: Mapping[str, ModulePlan], config: LoRAConfig, base: BaseSignature) -> Iterator[str]:
    """Modules with a delta that the config's lists leave out."""
    if not config.target_modules:
        return
    targets = Targets(config)
    deltas = [
        module
        for module, part in parts.items()
        if part.low_rank is not None and not target_parameters_of(module, config, part.shape)
    ]
    partners = _partners(base) if config.tied else {}
    with_partner = {module: {module, partners.get(module, module)} for module in deltas}
    names = {module: [name for one in pair for name in _names(one, config)] for module, pair in with_partner.items()}
    outside = [module for module in deltas if not any(targets.has(name) for name in names[module])]
    if outside:
        fields = " and ".join(targets.fields_against(outside))
        yield (
            f"it has deltas of {len(deltas)} modules, and by {fields} in adapter_config.json PEFT would load those of "
            f"{len(deltas) - len(outside)} and ignore the tensors of {first(outside)}: correct the config, or take "
            "these tensors out"
        )


def _partners(base: BaseSignature) -> dict[str, str]:
    """Modules that PEFT ties with ``ensure_weight_tying``: a head and its embedding."""
    return {**base.tied, **{source: head for head, source in base.tied.items()}}


def _names(module: str, config: LoRAConfig) -> set[str]:
    """The module's name in the base, and in the model that was trained."""
    trained = config.trained_name(module)
    return {module, trained} if len(trained) <= _MAX_CHARS else {module}


class Targets:
    """The modules that a config's lists name."""

    def __init__(self, config: LoRAConfig) -> None:
        self._named, self._excluded = _Ends(config.target_modules), _Ends(config.excluded)
        self._saved = _Ends(config.modules_to_save)
        self._layers, self._patterns = config.layers, config.layers_pattern
        self._fields = {"layers_to_transform": config.layers, "exclude_modules": config.excluded}

    def fields_against(self, modules: Sequence[str]) -> list[str]:
        """The fields that leave these modules out."""
        saved = any(self._is_saved(module) for module in modules)
        others = [name for name, value in self._fields.items() if value]
        return ["target_modules", *others, *(["modules_to_save"] if saved else [])]

    def has(self, module: str) -> bool:
        """Whether PEFT gives the module a delta."""
        if self._excluded.match(module) or self._is_saved(module):
            return False
        if module in self._named.names or not self._layers:
            return self._named.match(module)
        return self._named.match(module) and _layer(module, self._patterns) in self._layers

    def _is_saved(self, module: str) -> bool:
        """Whether it is saved whole, or inside of a module that is."""
        return any(self._saved.match(name) for name in _holders(module))


class _Ends:
    """Names that stand for every module whose name is one of them, or ends with a dot and one of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._lengths = sorted({len(name) for name in self.names})

    def match(self, module: str) -> bool:
        dotted = f".{module}"
        fitting = (size for size in self._lengths if size <= len(module))
        return any(dotted[-size - 1] == "." and dotted[-size:] in self.names for size in fitting)


def _holders(module: str) -> Iterator[str]:
    """The module's name and those of all modules around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _layer(module: str, patterns: tuple[str, ...]) -> int | None:
    """The number of the module's layer: the first one inside its name that stands behind a list of layers."""
    parts = module.split(".")
    numbers = [at for at in range(1, len(parts) - 1) if parts[at].isdecimal()]
    before = {at: "." + ".".join(parts[:at]) for at in numbers}
    for pattern in patterns:
        for at in numbers:
            if before[at].endswith(f".{pattern}"):
                return int(parts[at])
    return next((int(parts[at]) for at in numbers if at > 1), None) if not patterns else None
