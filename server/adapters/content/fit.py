"""Whether the plans of modules fit the base and the config, as sentences that say what does not.

PEFT gives a delta to the modules that lists in ``adapter_config.json`` name, and ignores the tensors of all others:
``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern`` mean what they mean in
``check_target_module_exists`` of peft.tuners.tuners_utils. An expression among them is never evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from server.adapters.content.module_plan import LowRank, ModulePlan, num_experts, target_parameters_of
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.signature import BaseSignature, ModuleShape, Shape
from server.errors import first

_MAX_CHARS = 1024
"""Characters of a trained name that is looked at; no model has longer ones."""


def problems_of(
    parts: Mapping[str, ModulePlan], config: LoRAConfig, base: BaseSignature, *, max_rank: int
) -> Iterator[str]:
    for module, part in parts.items():
        yield from _size_problems(module, part)
        yield from _token_problems(module, part, base)
    wrong = [problem for module, part in parts.items() for problem in _shape_problems(module, part)]
    if wrong:
        yield f"tensors do not fit the base {base.name}: {first(wrong, '; ')}"
    yield from _rank_problems(parts, config, max_rank)
    yield from _config_problems(parts, config)
    yield from _absent_rows(parts, config, base)


def _shape_problems(module: str, part: ModulePlan) -> Iterator[str]:
    out = part.shape.size[1]
    if part.low_rank is not None:
        rows, columns = part.shape.size
        inside, outside = (columns, rows) if part.low_rank.swapped else (rows, columns)
        yield from _pair_problem(module, part.low_rank, part.low_rank.rank, inside, outside)
    for name, one in part.parameters.items():
        inside, outside = _in_out(part.shape, name)
        yield from _pair_problem(f"{module}.{name}", one, one.rank * num_experts(part.shape, name), inside, outside)
    for what, vector in (("magnitude", part.magnitude), ("bias of B", part.lora_bias)):
        if vector is not None and vector.shape != (out,):
            yield f"{module} ({what} {list(vector.shape)}; the base needs [{out}])"
    for name, entry in part.own.items():
        expected = part.shape.parameters.get(name)
        if expected is not None and entry.shape != expected and not _is_vocabulary(part.shape, entry.shape, expected):
            yield f"{module}.{name} {list(entry.shape)}; the base needs {list(expected)}"


def _pair_problem(name: str, one: LowRank, rows: int, inside: int, outside: int) -> Iterator[str]:
    if one.rank < 1 or one.a.shape != (rows, inside) or one.b.shape != (outside, rows):
        yield (
            f"{name} (A {list(one.a.shape)}, B {list(one.b.shape)}; "
            f"the base needs [{rows}, {inside}] and [{outside}, {rows}])"
        )


def _in_out(shape: ModuleShape, parameter: str) -> tuple[int, int]:
    size = shape.parameters[parameter]
    return (size[-2], size[-1]) if len(size) == 3 and shape.transposed else (size[-1], size[-2])


def _is_vocabulary(shape: ModuleShape, found: Shape, expected: Shape) -> bool:
    """Whether two weights differ in the number of tokens alone."""
    return shape.kind != "rows" and len(found) == len(expected) == 2 and found[1] == expected[1]


def _size_problems(module: str, part: ModulePlan) -> Iterator[str]:
    for name, entry in part.own.items():
        expected = part.shape.parameters.get(name)
        if expected is None:
            yield f"it brings {module}.{name}, which the base does not have: was it trained on another?"
        elif entry.shape != expected and _is_vocabulary(part.shape, entry.shape, expected):
            size = "larger" if entry.shape[0] > expected[0] else "smaller"
            yield (
                f"it brings {module}.{name} of {entry.shape[0]} tokens, a vocabulary {size} than the base's "
                f"{expected[0]}: serve a base of that size, or train it again without new tokens"
            )


def _token_problems(module: str, part: ModulePlan, base: BaseSignature) -> Iterator[str]:
    if part.tokens is None:
        return
    indices, rows = part.tokens.indices, part.tokens.rows.shape
    tokens, dim = part.shape.parameters.get("weight", (0, 0))[:2] if part.shape.kind != "rows" else (0, 0)
    if tokens == 0 or part.shape.transposed or "bias" in part.shape.parameters:
        yield f"it brings rows for tokens of {module}, which is no embedding and no head without a bias"
    elif rows != (len(indices), dim):
        yield (
            f"it brings {list(rows)} rows for tokens of {module}, and trainable_token_indices in adapter_config.json "
            f"names {len(indices)} tokens of {dim} numbers"
        )
    elif indices and max(indices) >= tokens:
        yield f"trainable_token_indices names token {max(indices)}; {module} has {tokens}"
    heads = [head for head, embedding in base.tied.items() if embedding == module]
    if part != ModulePlan(part.shape, tokens=part.tokens):
        yield f"it brings rows for tokens of {module} and another change of it, which PEFT does not combine"
    for head in heads:
        if base.modules[head].parameters.keys() != {"weight"}:
            yield f"it brings rows for tokens of {module}, whose head {head} has a bias, which PEFT leaves out"


def _absent_rows(parts: Mapping[str, ModulePlan], config: LoRAConfig, base: BaseSignature) -> Iterator[str]:
    """Tokens for whose rows no tensor came. A tied head has none where its tokens are the embedding's."""
    with_rows = {module for module, part in parts.items() if part.tokens is not None}
    tied = {
        head
        for head, source in base.tied.items()
        if source in with_rows and config.tokens_of(head) == config.tokens_of(source)
    }
    trained = [config.trained_name(module) for module in with_rows | tied]
    for end, indices in config.token_indices.items():
        if parts and not any(name.endswith(end) for name in trained):
            tokens = f"{len(indices)} {'token' if len(indices) == 1 else 'tokens'}" + (f" of {end}" if end else "")
            yield (
                f"trainable_token_indices in adapter_config.json names {tokens}, and there is no tensor of their rows "
                "(token_adapter.trainable_tokens_delta): save the adapter again, or take the field out if no rows were "
                "trained"
            )


def _rank_problems(parts: Mapping[str, ModulePlan], config: LoRAConfig, max_rank: int) -> Iterator[str]:
    largest = max((rank for part in parts.values() for rank in part.ranks), default=0)
    if largest > max_rank:
        yield f"its rank is {largest}; the limit is {max_rank} (setting max_lora_rank)"
    for module, part in parts.items():
        named = {f"{module}.{name}": one for name, one in part.parameters.items()}
        if part.low_rank is not None:
            key = f"{module}.weight" if part.low_rank.swapped else module
            named[key] = part.low_rank
        for name, one in named.items():
            if one.rank != config.rank(name):
                yield (
                    f"the tensors of {name} have rank {one.rank}, and adapter_config.json says {config.rank(name):g}: "
                    "they are not of one adapter"
                )


def _config_problems(parts: Mapping[str, ModulePlan], config: LoRAConfig) -> Iterator[str]:
    """Where PEFT would make up a tensor that is missing, or pass over one that is there."""
    scaled = {module: part for module, part in parts.items() if part.low_rank is not None}
    linears = {module: part for module, part in scaled.items() if part.shape.kind == "linear"}
    magnitudes = {module: part.magnitude is not None for module, part in scaled.items()}
    biases = {module: part.lora_bias is not None for module, part in linears.items()}
    yield from _agreement("use_dora", config.dora, "magnitude", magnitudes)
    yield from _agreement("lora_bias", config.lora_bias, "bias of B", biases)
    if alone := [module for module, part in parts.items() if module not in scaled and _has_vector(part)]:
        yield f"it brings a magnitude or a bias of B without A and B for {first(alone)}"


def _has_vector(part: ModulePlan) -> bool:
    return part.magnitude is not None or part.lora_bias is not None


def _agreement(flag: str, active: bool, what: str, present: Mapping[str, bool]) -> Iterator[str]:
    if odd := [module for module, there in present.items() if there != active]:
        there = "no" if active else "a"
        yield f"{flag} in adapter_config.json is {str(active).lower()}, and there is {there} {what} for {first(odd)}"


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
