"""What the name of each tensor in PEFT's file says: which module of the base, and which part of its change.

A module's low-rank delta is ``lora_A.weight`` and ``lora_B.weight``, with one ``base_layer`` more before them for each
parameter nested in it; an embedding's is ``lora_embedding_A`` and ``lora_embedding_B``. ``lora_B.bias`` is lora_bias's,
``lora_magnitude_vector`` DoRA's, ``token_adapter.trainable_tokens_delta`` trainable_token_indices'. A parameter's own
name is what modules_to_save or ``bias`` trained; after ``base_layer`` it is the base's of a module that has a delta.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from server.adapters.content.safetensors import TensorEntry

_PREFIX = "base_model.model."
_ROLES = (
    ("lora", re.compile(r"(.+?)((?:\.base_layer)*)\.lora_([AB])(?:\.default)?\.weight")),
    ("lora_bias", re.compile(r"(.+)\.lora_B(?:\.default)?\.bias")),
    ("embedding", re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")),
    ("magnitude", re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")),
    ("tokens", re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")),
    ("nothing", re.compile(r".+\.(?:lora_velora_embed(?:\.default)?|(?:original_module|modules_to_save)\.bias)")),
    ("base", re.compile(r"(.+?)(?:\.token_adapter)?\.base_layer\.([A-Za-z0-9_]+)")),
    ("own", re.compile(r"(.+)\.([A-Za-z0-9_]+)")),
)


@dataclass
class ModuleTensors:
    """The tensors of one module. ``levels`` has A and B by the depth of nesting.

    ``base`` says which of ``own`` PEFT writes into the base's parameter itself, which a tied module shares.
    """

    levels: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)
    embedding: dict[str, TensorEntry] = field(default_factory=dict)
    lora_bias: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    tokens: TensorEntry | None = None
    own: dict[str, TensorEntry] = field(default_factory=dict)
    base: set[str] = field(default_factory=set)


def sort_tensors(
    entries: Mapping[str, TensorEntry], modules: Iterable[str], saved: Iterable[str]
) -> tuple[dict[str, ModuleTensors], list[str]]:
    """Tensors by module, and the names that say nothing; ``saved`` are the ends of names of modules saved whole."""
    known, ends = set(modules), tuple(saved)
    found: dict[str, ModuleTensors] = {}
    strange: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name, entry in entries.items():
        role, match = _role(name.removeprefix(_PREFIX))
        what = () if match is None else ("own" if role == "base" else role, *match.groups())
        if match is None or (role == "own" and match[1] not in known) or what in seen:
            strange.append(f"{name} (twice)" if what in seen else name)
        elif role != "nothing":
            seen.add(what)
            _put(found.setdefault(match[1], ModuleTensors()), role, match, entry, saved=match[1].endswith(ends or "\n"))
    return found, strange


def _role(name: str) -> tuple[str, re.Match[str] | None]:
    return next(((role, match) for role, form in _ROLES if (match := form.fullmatch(name))), ("", None))


def _put(tensors: ModuleTensors, role: str, match: re.Match[str], entry: TensorEntry, *, saved: bool) -> None:
    match role:
        case "lora":
            tensors.levels.setdefault(match[2].count("."), {})[match[3]] = entry
        case "embedding":
            tensors.embedding[match[2]] = entry
        case "lora_bias":
            tensors.lora_bias = entry
        case "magnitude":
            tensors.magnitude = entry
        case "tokens":
            tensors.tokens = entry
        case _:
            tensors.own[match[2]] = entry
            if role == "base" or not saved:
                tensors.base.add(match[2])
