"""What the name of each tensor in PEFT's file says: which module of the base, and which part of its change.

A module's low-rank delta is ``lora_A.weight`` and ``lora_B.weight``, with one ``base_layer`` more before them for each
parameter nested in it; an embedding's is ``lora_embedding_A`` and ``lora_embedding_B``. ``lora_B.bias`` is lora_bias's,
``lora_magnitude_vector`` DoRA's, ``token_adapter.trainable_tokens_delta`` trainable_token_indices'. A parameter's own
name is what modules_to_save or ``bias`` trained; after ``base_layer`` it is the base's of a module that has a delta.
Where a model's state was saved as it was in memory, the adapter's name stands in them too: ``lora_A.default.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from base_files.safetensors_header import TensorEntry

PREFIX = "base_model.model."
_HOOKS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_fpw_module)(?:\.|$)"
)
"""``torch.compile``, FSDP, activation checkpointing, Fabric and FairScale: names that no model gives to its modules."""

_HOLDERS = frozenset({
    "base_model", "model", "module", "pretrained_model", "transformer", "gpt_neox",
    "language_model", "text_model", "llm", "thinker",
})  # fmt: skip
"""Modules that hold a whole language model: PEFT's and transformers' own, DDP's, TRL's, those of multimodal models."""


_MOST_HOLDERS = 12
"""Holders that may stand in a module's name beside those of its own name."""

_ADAPTER = r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?"
_ROLES = (
    ("lora", re.compile(rf"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<part>[AB]){_ADAPTER}\.weight")),
    ("lora_bias", re.compile(rf"(?P<module>.+)\.lora_B{_ADAPTER}\.bias")),
    ("embedding", re.compile(rf"(?P<module>.+)\.lora_embedding_(?P<part>[AB]){_ADAPTER}")),
    ("magnitude", re.compile(rf"(?P<module>.+)\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?")),
    ("tokens", re.compile(rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_ADAPTER}")),
    (
        "nothing",
        re.compile(r".+\.(?:lora_velora_embed(?:\.[^.]+)?|original_module\.[A-Za-z0-9_]+|modules_to_save\.bias)"),
    ),
    ("saved", re.compile(rf"(?P<module>.+)\.modules_to_save{_ADAPTER}\.(?P<part>[A-Za-z0-9_]+)")),
    ("base", re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<part>[A-Za-z0-9_]+)")),
    ("own", re.compile(r"(?P<module>.+)\.(?P<part>[A-Za-z0-9_]+)")),
)
_PARAMETERS = ("saved", "base", "own")


def without_hooks(name: str) -> str:
    """A tensor's or module's name without the wrappers that torch puts around modules while they are trained."""
    return _HOOKS.sub("", name).removesuffix(".")


class ModuleNames:
    """The base's modules, found by their own names or by those that they have in models that hold it.

    A training run may put the model into wrappers (compiled, parallel, multimodal) whose names end up in the tensors'
    names. The module is the same where the name without them is that of exactly one module of the base.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._own = frozenset(modules)
        self._most_parts = max((name.count(".") + 1 for name in self._own), default=0) + _MOST_HOLDERS
        self._by_tail: dict[str, str | None] = {}
        for name in self._own:
            tail = _tail(name)
            self._by_tail[tail] = None if tail in self._by_tail else name  # None: of two, so nobody's

    def find(self, name: str) -> str | None:
        """The base's name of a module; None where it has none, or two that it might be."""
        return name if name in self._own else self._by_tail.get(_tail(name))

    def unknown_wrapper(self, name: str) -> str | None:
        """What stands before a name of the base's, where that alone keeps the module from being found."""
        parts = name.split(".")
        starts = range(max(1, len(parts) - self._most_parts), len(parts))
        return next((".".join(parts[:start]) for start in starts if self.find(".".join(parts[start:]))), None)


def trained_name(name: str) -> str:
    """A module's name in the model that PEFT was given, which the patterns of its config are about."""
    return name.rpartition(PREFIX)[2].removeprefix("module.")


def _tail(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _HOLDERS)


@dataclass
class ModuleTensors:
    """The tensors of one module. ``levels`` has A and B by the depth of nesting.

    ``base`` says which of ``own`` PEFT writes into the base's parameter itself, which a tied module shares. ``bare``
    says which have the name of a parameter that no wrapper holds: PEFT finds it only in a module without a delta.
    """

    levels: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)
    embedding: dict[str, TensorEntry] = field(default_factory=dict)
    lora_bias: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    tokens: TensorEntry | None = None
    own: dict[str, TensorEntry] = field(default_factory=dict)
    base: set[str] = field(default_factory=set)
    bare: set[str] = field(default_factory=set)


@dataclass
class SortedTensors:
    """Tensors by module of the base, or by a name that it does not have.

    ``strange`` are names that say nothing, ``trained_names`` those of modules in the model that was trained where they
    are others, ``adapters`` the names of PEFT's adapters in the tensors' names, ``plain`` each tensor's name as PEFT
    writes it.
    """

    modules: dict[str, ModuleTensors] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    trained_names: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, None] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)


def sort_tensors(entries: Mapping[str, TensorEntry], names: ModuleNames, saved: Iterable[str]) -> SortedTensors:
    """Tensors by module; ``saved`` are the ends of names of modules saved whole."""
    ends = tuple(saved) or ("\n",)
    found = SortedTensors()
    seen: dict[tuple[str, ...], str] = {}
    for name, entry in entries.items():
        inside = without_hooks(name).removeprefix(PREFIX)
        role, match = _role(inside)
        if role == "nothing":
            continue
        module = None if match is None else names.find(match["module"])
        if match is None or (role in ("saved", "own") and module is None):
            found.strange.append(name)
            continue
        parts = match.groupdict()
        if parts.get("adapter"):
            found.adapters[parts["adapter"]] = None
        kind = "own" if role in _PARAMETERS else role
        what = (kind, module or match["module"], parts.get("depth") or "", parts.get("part") or "")
        if what in seen:
            found.strange.append(f"{name} (twice): {seen[what]} is the same tensor of {what[1]}")
            continue
        seen[what] = name
        _note_names(found, name, inside, match, module)
        whole = role == "saved" or match["module"].endswith(ends)
        _put(found.modules.setdefault(what[1], ModuleTensors()), role, match, entry, saved=whole)
    return found


def _role(name: str) -> tuple[str, re.Match[str] | None]:
    return next(((role, match) for role, form in _ROLES if (match := form.fullmatch(name))), ("", None))


def _note_names(found: SortedTensors, name: str, inside: str, match: re.Match[str], module: str | None) -> None:
    """The module's name in the model that was trained, and the tensor's as PEFT writes it."""
    written, tail = match["module"], inside[match.end("module") :]
    if match.groupdict().get("adapter"):
        tail = inside[match.end("module") : match.start("adapter") - 1] + inside[match.end("adapter") :]
    found.plain[name] = f"{PREFIX}{module or written}{tail.removeprefix('.modules_to_save')}"
    if module is not None and (trained := trained_name(written)) != module:
        found.trained_names[module] = trained


def _put(tensors: ModuleTensors, role: str, match: re.Match[str], entry: TensorEntry, *, saved: bool) -> None:
    match role:
        case "lora":
            tensors.levels.setdefault(match["depth"].count("."), {})[match["part"]] = entry
        case "embedding":
            tensors.embedding[match["part"]] = entry
        case "lora_bias":
            tensors.lora_bias = entry
        case "magnitude":
            tensors.magnitude = entry
        case "tokens":
            tensors.tokens = entry
        case _:
            tensors.own[match["part"]] = entry
            if role == "base" or not saved:
                tensors.base.add(match["part"])
            if role == "own" and not saved:
                tensors.bare.add(match["part"])
