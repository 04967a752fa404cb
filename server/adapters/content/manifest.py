"""One adapter folder, judged for itself and against the base: everything served comes from the bytes read here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapter_format.files import (
    ADDED_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    SIDECAR_FILE,
    SOURCE_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOKENS_FILE,
    WEIGHTS_FILE,
)
from adapter_format.sidecar import Sidecar, parse_sidecar
from base_files.safetensors_header import DTYPE_BYTES, TensorEntry, parse_header
from server.adapters.content.added_tokens import (
    SECTIONS,
    AddedToken,
    listed_in_head,
    nameless,
    parse_decoder,
    parse_ids,
    parse_listed,
    tokens_to_serve,
)
from server.adapters.content.file_kinds import kind_of_bytes
from server.adapters.content.folder import MAX_HEADER_BYTES, AdapterFiles, read_files
from server.adapters.content.generation_defaults import CompanionFiles, GenerationDefaults, merge_defaults, token_text
from server.adapters.content.peft_config import LoRAConfig, parse_peft_config
from server.adapters.content.plan import AdapterPlan, PlanError, make_plan
from server.adapters.content.safe_open import PASSING
from server.adapters.content.signature import BaseCheck, BaseSignature, base_check
from server.adapters.content.templates import is_same
from server.adapters.names import is_name
from server.errors import AdapterRejected
from server.metrics import BASE

EXPONENTS: Mapping[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
"""How wide each format is, and which bits are its exponent."""

_OTHER_DTYPE = re.compile(r"(?:[FIUC]|BF)\d{1,3}(?:_[A-Z0-9]{1,16})?")
"""What names of number formats look like, those of 8 bits and fewer among them."""


@dataclass(frozen=True)
class AdapterPolicy:
    """Largest rank, most bytes of a weights file, most bytes in memory; whose chat templates are trusted.

    ``trust_chat_templates`` trusts every adapter's, ``trusted_templates`` those of the adapters it names. Links are
    followed into ``roots``.
    """

    max_rank: int
    max_bytes: int
    max_memory: int | None = None
    trust_chat_templates: bool = True
    trusted_templates: frozenset[str] = frozenset()
    roots: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a folder's headers say: enough to list an adapter, not to serve it.

    ``unread`` are files that may not be read, and that it is served without, with the reason.
    """

    name: str
    path: Path
    config: LoRAConfig
    sidecar: Sidecar | None
    defaults: GenerationDefaults
    plan: AdapterPlan
    created: int
    unread: Mapping[str, str]
    base_check: BaseCheck


@dataclass(frozen=True)
class Manifest(Listing):
    """A folder's whole content. ``version_digest`` adds the generation defaults to ``weights_digest``."""

    weights_digest: str
    version_digest: str
    files: AdapterFiles = field(repr=False)

    @property
    def listing(self) -> Listing:
        return Listing(**{item.name: getattr(self, item.name) for item in fields(Listing)})

    @property
    def data(self) -> bytes:
        return self.files.weights


def list_folder(path: Path, base: BaseSignature, policy: AdapterPolicy, *, name: str | None = None) -> Listing:
    """Read and judge all but the tensors' bytes.

    Raises ``AdapterRejected`` with a sentence that says what to do, ``OSError`` where trying again may help.
    """
    with _refusals(name or path.name):
        files = read_files(path, max_bytes=policy.max_bytes, whole=False, roots=policy.roots)
        return _judge(path, base, policy, name or path.name, files)


def read_manifest(path: Path, base: BaseSignature, policy: AdapterPolicy, *, name: str | None = None) -> Manifest:
    """Read and judge the whole folder, which may be served under another ``name`` than its own. Raises as above."""
    with _refusals(name or path.name):
        files = read_files(path, max_bytes=policy.max_bytes, roots=policy.roots)
        listing = _judge(path, base, policy, name or path.name, files)
        check_values(files.weights, weights_header(files.weights, files.weights_size))
        check_tokenizer(files, base)
        files = files if listing.defaults.added_tokens else _without_idle_tokenizer(files, base)
        weights_digest = _digest(files.config, files.weights)
        template = _defaults_as_written(files, listing.sidecar).chat_template or ""
        defaults = [files.others.get(SIDECAR_FILE, b""), template.encode()]
        defaults += [files.others.get(GENERATION_FILE, b""), repr(listing.defaults.eos).encode()]
        defaults += [repr(tokens).encode()] if (tokens := listing.defaults.added_tokens) else []
        return Manifest(
            **vars(listing),
            weights_digest=weights_digest,
            version_digest=_digest(weights_digest.encode(), *defaults),
            files=files,
        )


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Whatever is wrong with a folder, as one kind of error."""
    try:
        yield
    except PlanError as error:
        raise AdapterRejected(name, "; ".join(error.problems[:3])) from None
    except ValueError as error:
        raise AdapterRejected(name, str(error)) from None
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise AdapterRejected(name, f"cannot be read: {error.strerror}") from None


def _judge(path: Path, base: BaseSignature, policy: AdapterPolicy, name: str, files: AdapterFiles) -> Listing:
    if not is_name(name):
        raise ValueError("the folder's name is no model name: use letters, digits, '.', '_' and '-', 128 at most")
    if name in (base.name, BASE):
        raise ValueError("this name means the base model: rename the folder")
    config = parse_peft_config(parse_json(files.config, CONFIG_FILE))
    sidecar = parse_optional(files, SIDECAR_FILE, parse_sidecar)
    checked = base_check(sidecar, base)
    defaults = generation_defaults_of(name, files, sidecar, base, policy)
    entries = weights_header(files.weights, files.weights_size)
    plan = make_plan(entries, config, base, max_rank=policy.max_rank)
    if policy.max_memory is not None and plan.num_bytes > policy.max_memory:
        raise ValueError(
            f"it needs {plan.num_bytes} bytes in memory; the limit is {policy.max_memory} (setting adapter_memory)"
        )
    _check_trained_tokens(plan, defaults, base, files.unread.get(TOKENS_FILE))
    config = replace(config, trained_names=plan.trained_names)
    return Listing(name, path, config, sidecar, defaults, plan, files.created, files.unread, checked)


def weights_header(data: bytes, size: int) -> Mapping[str, TensorEntry]:
    """The weights file's tensors. Raises ``ValueError`` that names the file, and what it is where it is another one."""
    try:
        entries = parse_header(data, size, max_bytes=MAX_HEADER_BYTES)
        for entry in entries.values():
            _check_dtype(entry)
    except ValueError as error:
        raise ValueError(kind_of_bytes(WEIGHTS_FILE, data) or f"{WEIGHTS_FILE}: {error}") from None
    return entries


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype in DTYPE_BYTES:
        return
    if not _OTHER_DTYPE.fullmatch(entry.dtype):
        raise ValueError(f"the header's entry for tensor {entry.name!r} is malformed")
    raise ValueError(
        f"tensor {entry.name!r} has the type {entry.dtype}, which is not served: save it as F32, F16 or BF16"
    )


def parse_json(data: bytes, name: str) -> Any:
    """A file's JSON. Raises ``ValueError`` that names the file, and what it is where it is another one."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(kind_of_bytes(name, data) or f"{name} is not valid JSON: {error}") from None


def parse_optional(files: AdapterFiles, name: str, parse: Callable[[Any], Any]) -> Any:
    """A file that need not be there, parsed; None where it is not."""
    return None if name not in files.others else parse(parse_json(files.others[name], name))


def _object(files: AdapterFiles, name: str) -> Mapping[str, Any]:
    """A neighbour's JSON object; what else it may hold is no concern of ours."""
    found = parse_optional(files, name, lambda data: data)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{name} is not a JSON object")
    return found or {}


def generation_defaults_of(
    name: str, files: AdapterFiles, sidecar: Sidecar | None, base: BaseSignature, policy: AdapterPolicy
) -> GenerationDefaults:
    """The generation defaults of sidecar and companion files.

    Raises ``ValueError`` where a template is not trusted, or the tokenizer's added tokens cannot be served.
    """
    defaults = replace(_defaults_as_written(files, sidecar), added_tokens=_added_tokens(files, base))
    template = defaults.chat_template
    if template is None or is_same(template, base.chat_template):
        return replace(defaults, chat_template=None if template is None else base.chat_template)
    own = sidecar is not None and sidecar.chat_template is not None and SOURCE_FILE not in files.others
    if not own and not policy.trust_chat_templates and name not in policy.trusted_templates:
        raise ValueError(
            "it brings a chat template of its own, which is not the base's: allow that with --trust-chat-templates, or "
            f"for this adapter with --trusted-templates {name}, or take it out of the folder ({TEMPLATE_FILE}, "
            f"chat_template in {TOKENIZER_FILE}) to use the base's"
        )
    return defaults


def _defaults_as_written(files: AdapterFiles, sidecar: Sidecar | None) -> GenerationDefaults:
    """What sidecar and companions ask for, whoever wrote it."""
    template = files.others.get(TEMPLATE_FILE)
    try:
        text = None if template is None else template.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{TEMPLATE_FILE} is not UTF-8 text") from None
    return merge_defaults(
        sidecar, CompanionFiles(text, _object(files, TOKENIZER_FILE), _object(files, GENERATION_FILE))
    )


def _added_tokens(files: AdapterFiles, base: BaseSignature) -> tuple[AddedToken, ...]:
    """The added tokens of the tokenizer beside the adapter; none where they are the base's, or cannot be compared."""
    config = _object(files, TOKENIZER_FILE)
    if base.tokenizer is None:
        return ()
    if files.tokens:
        if base.tokenizer.is_exceeded_by(files.tokens):
            raise ValueError(_other_tokenizer(SECTIONS["model"]))
        where, listed = TOKENS_FILE, _listed(files.tokens)
    elif config.get("added_tokens_decoder") is not None:
        where, listed = TOKENIZER_FILE, parse_decoder(config["added_tokens_decoder"], TOKENIZER_FILE)
    elif ADDED_FILE in files.others:
        ids = parse_json(files.others[ADDED_FILE], ADDED_FILE)
        where, listed = ADDED_FILE, parse_ids(ids, base.tokenizer, special=_special(config), where=ADDED_FILE)
    else:
        return ()
    named = _named_special(config)
    listed = tuple(replace(token, special=token.special or token.content in named) for token in listed)
    padding = token_text(config.get("pad_token"))
    return tokens_to_serve(listed, base.tokenizer, num_rows=base.vocab_size, padding=padding, where=where)


def _without_idle_tokenizer(files: AdapterFiles, base: BaseSignature) -> AdapterFiles:
    """The files without a tokenizer that changes nothing, where the other files list no other tokens than it."""
    rest = replace(files, tokens=b"")
    with suppress(ValueError):
        if not _added_tokens(rest, base):
            return rest
    return files


def _listed(tokenizer: bytes) -> tuple[AddedToken, ...]:
    """The added tokens of ``tokenizer.json``, of which no more than the beginning need be there."""
    listed = listed_in_head(tokenizer)
    if listed is None:
        found = parse_json(tokenizer, TOKENS_FILE)
        listed = found.get("added_tokens", []) if isinstance(found, dict) else found
    return parse_listed(listed, TOKENS_FILE)


def _named_special(config: Mapping[str, Any]) -> set[str]:
    """The texts of tokens that have a name in ``tokenizer_config.json``, as ``eos_token``.

    They are special in transformers whatever the tokenizer's list of added tokens says of them.
    """
    named = [value for name, value in config.items() if name.endswith("_token")]
    more = config.get("extra_special_tokens")
    named += more.values() if isinstance(more, dict) else []
    return {text for token in named if isinstance(text := token_text(token), str)}


def _special(config: Mapping[str, Any]) -> set[str]:
    """The texts of tokens that ``tokenizer_config.json`` calls special, by a name or in a list."""
    more = [config.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    listed = [token for tokens in more if isinstance(tokens, list) for token in tokens]
    return _named_special(config) | {text for token in listed if isinstance(text := token_text(token), str)}


def check_tokenizer(files: AdapterFiles, base: BaseSignature) -> None:
    """Raises ``ValueError`` where the whole tokenizer beside an adapter gives texts other ids than the base's."""
    if not files.tokens or base.tokenizer is None:
        return
    if difference := base.tokenizer.difference(files.tokens, lambda: parse_json(files.tokens, TOKENS_FILE)):
        raise ValueError(_other_tokenizer(difference))


def _other_tokenizer(part: str) -> str:
    return (
        f"its tokenizer is not the base's: its {part} in {TOKENS_FILE} differs, so that prompts would have other token "
        f"ids; serve the base it was trained on, or take {TOKENS_FILE} out of the folder for the base's"
    )


def _check_trained_tokens(
    plan: AdapterPlan, defaults: GenerationDefaults, base: BaseSignature, unread: str | None
) -> None:
    """Raises ``ValueError`` where rows were trained for tokens that have no text.

    ``unread`` is why the tokenizer in the folder is not read, where there is one.
    """
    trained = sorted({token for part in plan.parts.values() if part.tokens for token in part.tokens.indices})
    if base.tokenizer is not None and (token := nameless(trained, base.tokenizer, defaults.added_tokens)) is not None:
        where = f"trainable_token_indices in {CONFIG_FILE} names token {token}"
        if unread is not None:
            raise ValueError(
                f"{where}, which the base's tokenizer does not have, and the one in the folder cannot be read: {unread}"
            )
        raise ValueError(
            f"{where}, which the base's tokenizer does not have: "
            f"put the tokenizer that it was trained with ({TOKENS_FILE}, {TOKENIZER_FILE}) into the folder"
        )


def check_values(data: bytes, entries: Mapping[str, TensorEntry]) -> None:
    """No NaN and no infinity: in each format the numbers whose exponent bits are all ones."""
    for name, entry in entries.items():
        kind, exponent = EXPONENTS[entry.dtype]
        bits = np.frombuffer(data, kind, (entry.end - entry.begin) // kind.itemsize, entry.begin)
        if ((bits & exponent) == exponent).any():
            raise ValueError(f"the weights of {name} hold NaN or infinity: train it again")


def _digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()
