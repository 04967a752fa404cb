"""The changes of a base's modules by an adapter: read from the tensors' names, checked against the base.

``target_modules`` may be a regular expression, which is never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from base_files.safetensors_header import FLOAT_DTYPES, TensorEntry
from server.adapters.content.fit import problems_of, shape_problems, target_problems
from server.adapters.content.module_plan import ModulePlan, module_plan
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.signature import BaseSignature
from server.adapters.content.tensor_names import ModuleNames, ModuleTensors, SortedTensors, sort_tensors
from server.errors import first

_OLD_EXPERT = re.compile(r"\.experts\.\d+\.")
_FACTOR = re.compile(r"\.lora_[AB]\.(?:[^.]+\.)?weight$")


@dataclass(frozen=True)
class AdapterPlan:
    """The change of every module that an adapter touches.

    ``names`` maps each tensor's name to the one that PEFT writes for this base. ``trained_names`` maps modules to their
    names in the trained model, where these differ from the base's.
    """

    parts: Mapping[str, ModulePlan]
    names: Mapping[str, str] = field(default_factory=dict)
    trained_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its low-rank deltas; 0 if there are none."""
        return max((delta.rank for part in self.parts.values() for delta in part.low_ranks), default=0)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def num_bytes(self) -> int:
        """Upper bound of the bytes in memory: tensors equal to the base's are not kept."""
        tensors = {name: size for part in self.parts.values() for name, size in part.tensor_bytes()}
        return sum(tensors.values()) + sum(part.vector_bytes for part in self.parts.values())

    @property
    def composable(self) -> bool:
        """Whether it has only low-rank deltas, which can be scaled and added."""
        return all(part.composable for part in self.parts.values())


class PlanError(ValueError):
    """Tensors that cannot be served on the base; ``problems`` has every reason, the first is the message.

    ``misfit``: the base lacks one of the modules, or it has another shape there.
    """

    def __init__(self, problems: list[str], *, misfit: bool = False) -> None:
        super().__init__(problems[0])
        self.problems, self.misfit = problems, misfit


def make_plan(
    entries: Mapping[str, TensorEntry], config: LoRAConfig, base: BaseSignature, *, max_rank: int
) -> AdapterPlan:
    """The plan of a weights file. Raises ``PlanError`` with every problem."""
    names = ModuleNames({*base.modules, *base.others})
    ungathered = _ungathered_problem(entries)
    if ungathered is not None:
        raise PlanError([ungathered])
    sorted_tensors = sort_tensors(entries, names, config.modules_to_save)
    modules = sorted_tensors.modules
    config = replace(config, trained_names=sorted_tensors.trained_names)
    problems = [*_tensor_problems(entries, sorted_tensors), *_module_problems(modules, names, base)]
    parts: dict[str, ModulePlan] = {}
    for module, tensors in modules.items():
        if module in base.modules:
            try:
                parts[module] = module_plan(module, tensors, config, base.modules[module])
            except ValueError as error:
                problems.append(str(error))
    problems += problems_of(parts, config, base, max_rank=max_rank)
    if modules:
        problems += target_problems(parts, config, base)
        problems += _absent_modules(modules, config, base)
    if problems:
        known = {*base.modules, *base.others}
        raise PlanError(problems, misfit=not modules.keys() <= known or bool(shape_problems(parts)))
    return AdapterPlan(_tie(parts, modules, base), sorted_tensors.plain, sorted_tensors.trained_names)


def _ungathered_problem(entries: Mapping[str, TensorEntry]) -> str | None:
    """Whether the file holds the shards of one device of a distributed run."""
    if empty := [name for name, entry in entries.items() if 0 in entry.shape]:
        return (
            f"{len(empty)} of its tensors are empty ({first(empty)}): DeepSpeed ZeRO-3 saved them without gathering; "
            "set stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the checkpoint"
        )
    if flat := [name for name, entry in entries.items() if _FACTOR.search(name) and len(entry.shape) == 1]:
        return (
            f"its tensors are flat ({first(flat)}), the pieces of FSDP: save it with a full state dict "
            "(fsdp_state_dict_type FULL_STATE_DICT)"
        )
    return None


def _tensor_problems(entries: Mapping[str, TensorEntry], tensors: SortedTensors) -> Iterator[str]:
    strange, adapters = tensors.strange, list(tensors.adapters)
    if not tensors.modules and not strange:
        yield "it holds no tensors, so it would change nothing"
    if len(adapters) > 1:
        yield f"it holds several adapters ({first(adapters)}): save one alone, save_pretrained(selected_adapters=[...])"
        return
    if wrong := [f"{name} ({entry.dtype})" for name, entry in entries.items() if entry.dtype not in FLOAT_DTYPES]:
        yield f"its tensors must be floats (F32, F16 or BF16), and some are not: {first(wrong)}"
    if strange:
        yield f"it holds tensors that are no part of a LoRA adapter for this base: {first(strange)}"


def _module_problems(modules: Mapping[str, ModuleTensors], names: ModuleNames, base: BaseSignature) -> Iterator[str]:
    unknown = [module for module in modules if module not in base.modules and module not in base.others]
    if old := [module for module in unknown if _OLD_EXPERT.search(module)]:
        yield (
            f"it was written for transformers 4, whose experts were modules ({first(old)}): load it with PEFT and save "
            "it again, so that they become parameters"
        )
    elif wrapped := {module: wrapper for module in unknown if (wrapper := names.unknown_wrapper(module))}:
        wrappers = list(dict.fromkeys(wrapped.values()))
        yield (
            f"its tensors' names have {first(wrappers)} before the base's modules ({first(list(wrapped))}), a wrapper "
            "or another part of a larger model: save the adapter of the language model alone"
        )
    elif unknown:
        yield f"the base {base.name} has no module {first(unknown)}: was it trained on another base?"
    if partial := [module for module in modules if module in base.others]:
        yield f"modules that do not see every row of a batch cannot be adapted: {first(partial)}"
    if bare := [f"{module}.{name}" for module, tensors in modules.items() for name in _bare_weights(tensors)]:
        yield (
            f"it brings {first(bare)} beside a delta of that module, which PEFT would ignore: take it out, or name it "
            "as PEFT does (base_layer.weight) if it was trained"
        )


def _bare_weights(tensors: ModuleTensors) -> list[str]:
    """Parameters but biases of a module with a delta that lack ``base_layer``. PEFT before 0.6 wrote biases so."""
    has_delta = tensors.levels or tensors.embedding
    return sorted(name for name in tensors.bare if "bias" not in name) if has_delta else []


def _absent_modules(modules: Mapping[str, ModuleTensors], config: LoRAConfig, base: BaseSignature) -> Iterator[str]:
    """Modules that the config names and the base has, but the weights file has no tensor of."""
    missing = _suffixes(base.modules) - _suffixes(base.modules.keys() & modules.keys())
    targets = [name for name in config.target_modules if name in missing and not config.narrowed]
    in_base = [name for name in config.modules_to_save if _is_suffix(name, base.modules)]
    saved = [name for name in in_base if not _is_suffix(name, modules)]
    for key, names in (("target_modules", targets), ("modules_to_save", saved)):
        if names:
            yield f"{key} in adapter_config.json names {first(names)}, and there is no tensor of such a module"


def _suffixes(modules: Iterable[str]) -> set[str]:
    """Every module's name, and its suffixes that follow a dot."""
    parts = [module.split(".") for module in modules]
    return {".".join(part[start:]) for part in parts for start in range(len(part))}


def _is_suffix(name: str, modules: Iterable[str]) -> bool:
    return any(module.endswith(name) for module in modules)


def _tie(
    parts: Mapping[str, ModulePlan], modules: Mapping[str, ModuleTensors], base: BaseSignature
) -> Mapping[str, ModulePlan]:
    """Apply the embedding's change to a tied head, as PEFT does: rows of tokens, and a weight of the base itself."""
    tied = dict(parts)
    for head, source in base.tied.items():
        pair = {name: tied.get(name, ModulePlan(base.modules[name])) for name in (source, head)}
        if pair[source].tokens is not None and pair[head].tokens is None:
            tied[head] = replace(pair[head], tokens=pair[source].tokens)
        written = [pair[name].own["weight"] for name in pair if name in modules and "weight" in modules[name].base]
        for name, part in pair.items():
            saved = "weight" in part.own and "weight" not in modules[name].base
            if written and not saved:
                tied[name] = replace(part, own={**part.own, "weight": written[-1]})
    return tied
