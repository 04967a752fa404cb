"""Checks the plans of modules against the base and the config; yields a sentence for each problem.

PEFT applies deltas only to modules that ``adapter_config.json`` selects, and ignores the tensors of all others:
``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern`` have the meaning of
``check_target_module_exists`` in peft.tuners.tuners_utils. Regular expressions among them are never evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from server.adapters.content.module_plan import LowRank, ModulePlan, num_experts, target_parameters_of
from server.adapters.content.peft_config import LoRAConfig
from server.adapters.content.signature import BaseSignature, ModuleShape, Shape
from server.errors import first

_MAX_CHARS = 1024
"""Longest trained name that is compared, in characters; no model has longer ones."""


def problems_of(
    parts: Mapping[str, ModulePlan], config: LoRAConfig, base: BaseSignature, *, max_rank: int
) -> Iterator[str]:
    for module, part in parts.items():
        yield from _size_problems(module, part)
        yield from _token_problems(module, part, base)
    if wrong := shape_problems(parts):
        yield f"tensors do not fit the base {base.name}: {first(wrong, '; ')}"
    yield from _rank_problems(parts, config, max_rank)
    yield from _config_problems(parts, config)
    yield from _absent_rows(parts, config, base)


def shape_problems(parts: Mapping[str, ModulePlan]) -> list[str]:
    """Tensors of another shape than the base needs."""
    return [problem for module, part in parts.items() for problem in _shape_problems(module, part)]


def _shape_problems(module: str, part: ModulePlan) -> Iterator[str]:
    out = part.shape.size[1]
    if part.low_rank is not None:
        rows, columns = part.shape.size
        inside, outside = (columns, rows) if part.low_rank.swapped else (rows, columns)
        yield from _pair_problem(module, part.low_rank, part.low_rank.rank, inside, outside)
    for name, delta in part.parameters.items():
        inside, outside = _in_out(part.shape, name)
        yield from _pair_problem(f"{module}.{name}", delta, delta.rank * num_experts(part.shape, name), inside, outside)
    for what, vector in (("magnitude", part.magnitude), ("bias of B", part.lora_bias)):
        if vector is not None and vector.shape != (out,):
            yield f"{module} ({what} {list(vector.shape)}; the base needs [{out}])"
    for name, entry in part.own.items():
        expected = part.shape.parameters.get(name)
        if expected is not None and entry.shape != expected and not _is_vocabulary(part.shape, entry.shape, expected):
            yield f"{module}.{name} {list(entry.shape)}; the base needs {list(expected)}"


def _pair_problem(name: str, delta: LowRank, rows: int, inside: int, outside: int) -> Iterator[str]:
    if delta.rank < 1 or delta.a.shape != (rows, inside) or delta.b.shape != (outside, rows):
        yield (
            f"{name} (A {list(delta.a.shape)}, B {list(delta.b.shape)}; "
            f"the base needs [{rows}, {inside}] and [{outside}, {rows}])"
        )


def _in_out(shape: ModuleShape, parameter: str) -> tuple[int, int]:
    size = shape.parameters[parameter]
    return (size[-2], size[-1]) if len(size) == 3 and shape.transposed else (size[-1], size[-2])


def _is_vocabulary(shape: ModuleShape, found: Shape, expected: Shape) -> bool:
    """Whether two weights differ only in the number of tokens."""
    return shape.kind != "rows" and len(found) == len(expected) == 2 and found[1] == expected[1]


def _size_problems(module: str, part: ModulePlan) -> Iterator[str]:
    for name, entry in part.own.items():
        expected = part.shape.parameters.get(name)
        if expected is None:
            yield f"it brings {module}.{name}, which the base does not have: was it trained on another base?"
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
    if part != ModulePlan(part.shape, tokens=part.tokens):
        yield f"it brings rows for tokens of {module} and another change of it, which PEFT does not combine"
    for head in [head for head, embedding in base.tied.items() if embedding == module]:
        if base.modules[head].parameters.keys() != {"weight"}:
            yield f"it brings rows for tokens of {module}, whose head {head} has a bias, which PEFT leaves out"


def _absent_rows(parts: Mapping[str, ModulePlan], config: LoRAConfig, base: BaseSignature) -> Iterator[str]:
    """Trained tokens without a tensor of rows. A tied head has none if its tokens are the embedding's."""
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
    largest = max((delta.rank for part in parts.values() for delta in part.low_ranks), default=0)
    if largest > max_rank:
        yield f"its rank is {largest}; the limit is {max_rank} (setting max_lora_rank)"
    for module, part in parts.items():
        named = {f"{module}.{name}": delta for name, delta in part.parameters.items()}
        if part.low_rank is not None:
            key = f"{module}.weight" if part.low_rank.swapped else module
            named[key] = part.low_rank
        for name, delta in named.items():
            if delta.rank != config.rank(name):
                yield (
                    f"the tensors of {name} have rank {delta.rank}, and adapter_config.json says "
                    f"{config.rank(name):g}: they are not of one adapter"
                )


def _config_problems(parts: Mapping[str, ModulePlan], config: LoRAConfig) -> Iterator[str]:
    """Flags that disagree with the tensors: PEFT would invent the missing tensors, or ignore the others."""
    with_delta = {module: part for module, part in parts.items() if part.low_rank is not None}
    magnitudes = {module: part.magnitude is not None for module, part in with_delta.items()}
    biases = {module: part.lora_bias is not None for module, part in with_delta.items() if part.shape.kind == "linear"}
    yield from _agreement("use_dora", config.dora, "magnitude", magnitudes)
    yield from _agreement("lora_bias", config.lora_bias, "bias of B", biases)
    for_vectors = [module for module, part in parts.items() if part.magnitude is not None or part.lora_bias is not None]
    if alone := [module for module in for_vectors if module not in with_delta]:
        yield f"it brings a magnitude or a bias of B without A and B for {first(alone)}"


def _agreement(flag: str, active: bool, what: str, present: Mapping[str, bool]) -> Iterator[str]:
    if odd := [module for module, is_present in present.items() if is_present != active]:
        article = "no" if active else "a"
        yield f"{flag} in adapter_config.json is {str(active).lower()}, and there is {article} {what} for {first(odd)}"


def target_problems(parts: Mapping[str, ModulePlan], config: LoRAConfig, base: BaseSignature) -> Iterator[str]:
    """Modules with a delta that the config does not select."""
    if not config.target_modules:
        return
    targets = Targets(config)
    deltas = [
        module
        for module, part in parts.items()
        if part.low_rank is not None and not target_parameters_of(module, config, part.shape)
    ]
    partners = _partners(base) if config.tied else {}
    outside = [
        module
        for module in deltas
        if not any(
            targets.has(name) for tied in {module, partners.get(module, module)} for name in _names(tied, config)
        )
    ]
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
    """The modules that a config selects."""

    def __init__(self, config: LoRAConfig) -> None:
        self._named, self._excluded = _Suffixes(config.target_modules), _Suffixes(config.excluded)
        self._saved = _Suffixes(config.modules_to_save)
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
        """Whether the module, or one that contains it, is saved whole."""
        return any(self._saved.match(name) for name in _parents(module))


class _Suffixes:
    """Names that match every module with such a name, or with one as a suffix that follows a dot."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._lengths = sorted({len(name) for name in self.names})

    def match(self, module: str) -> bool:
        dotted = f".{module}"
        lengths = (size for size in self._lengths if size <= len(module))
        return any(dotted[-size - 1] == "." and dotted[-size:] in self.names for size in lengths)


def _parents(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


def _layer(module: str, patterns: tuple[str, ...]) -> int | None:
    """The number of the module's layer: the first number in its name that follows one of ``patterns``, or any list."""
    parts = module.split(".")
    positions = [position for position in range(1, len(parts) - 1) if parts[position].isdecimal()]
    for pattern in patterns:
        for position in positions:
            if ("." + ".".join(parts[:position])).endswith(f".{pattern}"):
                return int(parts[position])
    if patterns:
        return None
    return next((int(parts[position]) for position in positions if position > 1), None)
