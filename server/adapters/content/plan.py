"""What an adapter's tensors do to which modules of the base: read from the tensors' names, checked against the base.

``target_modules`` may be a regular expression, which is never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from base_files.safetensors_header import FLOAT_DTYPES, TensorEntry
from server.adapters.content.fit import problems_of, target_problems
from server.adapters.content.module_plan import ModulePlan, module_plan
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.signature import BaseSignature
from server.adapters.content.tensor_names import ModuleNames, ModuleTensors, SortedTensors, sort_tensors
from server.errors import first

_OLD_EXPERT = re.compile(r"\.experts\.\d+\.")
_FACTOR = re.compile(r"\.lora_[AB]\.(?:[^.]+\.)?weight$")


@dataclass(frozen=True)
class AdapterPlan:
    """Every module an adapter touches, and how.

    ``names`` has each tensor's name as PEFT writes it for this base.

    ``trained_names`` are what modules were called in the model that was trained, where that is not the base's name.
    """

    parts: Mapping[str, ModulePlan]
    names: Mapping[str, str] = field(default_factory=dict)
    trained_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its modules, 0 where none has a low-rank delta."""
        return max((rank for part in self.parts.values() for rank in part.ranks), default=0)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, at most: what turns out equal to the base's own is not kept."""
        tensors = {name: size for part in self.parts.values() for name, size in part.tensor_bytes()}
        return sum(tensors.values()) + sum(part.vector_bytes for part in self.parts.values())

    @property
    def composable(self) -> bool:
        """Whether it is plain low-rank deltas, which can be scaled and added up."""
        return all(part.composable for part in self.parts.values())


class PlanError(ValueError):
    """Why the tensors do not fit; ``problems`` has every reason, the first is the message."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems[0])
        self.problems = problems


def make_plan(
    entries: Mapping[str, TensorEntry], config: LoRAConfig, base: BaseSignature, *, max_rank: int
) -> AdapterPlan:
    """The plan of a weights file. Raises ``PlanError`` with all that is wrong."""
    names = ModuleNames({*base.modules, *base.others})
    if pieces := _pieces(entries):
        raise PlanError([pieces])
    tensors_of = sort_tensors(entries, names, config.modules_to_save)
    found, config = tensors_of.modules, replace(config, trained_names=tensors_of.trained_names)
    problems = [*_tensor_problems(entries, tensors_of), *_module_problems(found, names, base)]
    parts: dict[str, ModulePlan] = {}
    for module, tensors in found.items():
        if module in base.modules:
            try:
                parts[module] = module_plan(module, tensors, config, base.modules[module])
            except ValueError as error:
                problems.append(str(error))
    problems += problems_of(parts, config, base, max_rank=max_rank)
    problems += [*target_problems(parts, config, base), *_absent(found, config, base)] if found else []
    if problems:
        raise PlanError(problems)
    return AdapterPlan(_tie(parts, found, base), tensors_of.plain, tensors_of.trained_names)


def _pieces(entries: Mapping[str, TensorEntry]) -> str | None:
    """What a run on several devices saved where it did not gather its tensors first."""
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


def _tensor_problems(entries: Mapping[str, TensorEntry], tensors_of: SortedTensors) -> Iterator[str]:
    strange, adapters = tensors_of.strange, list(tensors_of.adapters)
    if not tensors_of.modules and not strange:
        yield "it holds no tensors, so it would change nothing"
    if len(adapters) > 1:
        yield f"it holds several adapters ({first(adapters)}): save one alone, save_pretrained(selected_adapters=[...])"
        return
    if wrong := [f"{name} ({entry.dtype})" for name, entry in entries.items() if entry.dtype not in FLOAT_DTYPES]:
        yield f"its tensors must be floats (F32, F16 or BF16), and some are not: {first(wrong)}"
    if strange:
        yield f"it holds tensors that are no part of a LoRA adapter for this base: {first(strange)}"


def _module_problems(found: Mapping[str, ModuleTensors], names: ModuleNames, base: BaseSignature) -> Iterator[str]:
    unknown = [module for module in found if module not in base.modules and module not in base.others]
    if old := [module for module in unknown if _OLD_EXPERT.search(module)]:
        yield (
            f"it was written for transformers 4, whose experts were modules: load it with PEFT and save it again, and "
            f"they become parameters ({first(old)})"
        )
    elif wrapped := {module: wrapper for module in unknown if (wrapper := names.unknown_wrapper(module))}:
        wrappers = list(dict.fromkeys(wrapped.values()))
        yield (
            f"its tensors' names have {first(wrappers)} before the base's modules ({first(list(wrapped))}), which is a "
            "wrapper or another part of a larger model: save the adapter of the language model alone"
        )
    elif unknown:
        yield f"the base {base.name} has no module {first(unknown)}: was it trained on another base?"
    if partial := [module for module in found if module in base.others]:
        yield f"modules that do not see every row of a batch cannot be adapted here: {first(partial)}"
    if bare := [f"{module}.{name}" for module, tensors in found.items() for name in _bare_weights(tensors)]:
        yield (
            f"it brings {first(bare)} beside a delta of that module, which PEFT would ignore: take it out, or name it "
            "as PEFT does (base_layer.weight) if it was trained"
        )


def _bare_weights(tensors: ModuleTensors) -> list[str]:
    """Parameters but biases that stand beside a delta as if there were none. PEFT before 0.6 wrote biases so."""
    has_delta = tensors.levels or tensors.embedding
    return sorted(name for name in tensors.bare if "bias" not in name) if has_delta else []


def _absent(found: Mapping[str, ModuleTensors], config: LoRAConfig, base: BaseSignature) -> Iterator[str]:
    """Modules that the config names, that the base has, and for which no tensor came."""
    missing = _ends(base.modules) - _ends(base.modules.keys() & found.keys())
    absent = {
        "target_modules": [name for name in config.target_modules if name in missing and not config.narrowed],
        "modules_to_save": [
            name for name in config.modules_to_save if _any_ends(base.modules, name) and not _any_ends(found, name)
        ],
    }
    for key, names in absent.items():
        if names:
            yield f"{key} in adapter_config.json names {first(names)}, and there is no tensor of such a module"


def _ends(modules: Iterable[str]) -> set[str]:
    """Every module's name, and its ends behind a dot."""
    parts = [module.split(".") for module in modules]
    return {".".join(part[start:]) for part in parts for start in range(len(part))}


def _any_ends(modules: Iterable[str], end: str) -> bool:
    return any(module.endswith(end) for module in modules)


def _tie(
    parts: Mapping[str, ModulePlan], found: Mapping[str, ModuleTensors], base: BaseSignature
) -> Mapping[str, ModulePlan]:
    """What PEFT does to a tied head with the embedding: rows of tokens, and a weight written into the base's own."""
    tied = dict(parts)
    for head, source in base.tied.items():
        pair = {name: tied.get(name, ModulePlan(base.modules[name])) for name in (source, head)}
        if pair[source].tokens is not None and pair[head].tokens is None:
            tied[head] = replace(pair[head], tokens=pair[source].tokens)
        written = [pair[name].own["weight"] for name in pair if name in found and "weight" in found[name].base]
        for name, part in pair.items():
            saved = "weight" in part.own and "weight" not in found[name].base
            if written and not saved:
                tied[name] = replace(part, own={**part.own, "weight": written[-1]})
    return tied
