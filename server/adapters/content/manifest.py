"""Reads an adapter folder whole or by its headers, and checks it by itself and against the base."""

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
    first_without_text,
    listed_in_head,
    parse_decoder,
    parse_ids,
    parse_listed,
    tokens_to_serve,
)
from server.adapters.content.base_check import OtherBase, base_check, other_base_name
from server.adapters.content.file_kinds import kind_of_bytes
from server.adapters.content.folder import MAX_HEADER_BYTES, AdapterFiles, read_files
from server.adapters.content.generation_defaults import CompanionFiles, GenerationDefaults, merge_defaults, token_text
from server.adapters.content.peft_config import LoRAConfig, parse_peft_config
from server.adapters.content.plan import AdapterPlan, PlanError, make_plan
from server.adapters.content.safe_open import PASSING
from server.adapters.content.signature import BaseCheck, BaseSignature
from server.adapters.content.templates import is_same
from server.adapters.names import is_name
from server.errors import AdapterRejected
from server.metrics import BASE

EXPONENTS: Mapping[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}
"""Unsigned type of the width of each format, and the mask of its exponent bits."""

_OTHER_DTYPE = re.compile(r"(?:[FIUC]|BF)\d{1,3}(?:_[A-Z0-9]{1,16})?")
"""Names of number formats, also those of 8 bits and fewer."""


@dataclass(frozen=True)
class AdapterPolicy:
    """The operator's rules for adapters: limits of rank, file size and memory, trusted chat templates, link targets.

    ``trust_chat_templates`` trusts all adapters, ``trusted_templates`` those that it names. Links are followed into
    ``roots``.
    """

    max_rank: int
    max_bytes: int
    max_memory: int | None = None
    trust_chat_templates: bool = True
    trusted_templates: frozenset[str] = frozenset()
    roots: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The content of a folder's headers: enough to list an adapter, not to serve it.

    ``unread`` maps files that may not be read, and that the adapter is served without, to the reason. ``base_note``
    says in which format the base was in training, if in another one than the server's.
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
    base_note: str | None


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
    """Read and check everything but the tensors' values.

    Raises ``AdapterRejected`` with the reason and the remedy; ``OSError`` for temporary errors.
    """
    with _refusals(name or path.name):
        files = read_files(path, max_bytes=policy.max_bytes, whole=False, roots=policy.roots)
        return _check_files(path, base, policy, name or path.name, files)


def read_manifest(path: Path, base: BaseSignature, policy: AdapterPolicy, *, name: str | None = None) -> Manifest:
    """Read and check the whole folder, under its own or another ``name``. Raises as ``list_folder``."""
    with _refusals(name or path.name):
        files = read_files(path, max_bytes=policy.max_bytes, roots=policy.roots)
        listing = _check_files(path, base, policy, name or path.name, files)
        check_values(files.weights, weights_header(files.weights, files.weights_size))
        check_tokenizer(files, base)
        if not listing.defaults.added_tokens:
            files = _without_redundant_tokenizer(files, base)
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
    """Convert every permanent error into ``AdapterRejected``."""
    try:
        yield
    except PlanError as error:
        raise AdapterRejected(name, "; ".join(error.problems[:3])) from None
    except OtherBase as error:
        raise AdapterRejected(name, str(error), other_base=error.base) from None
    except ValueError as error:
        raise AdapterRejected(name, str(error)) from None
    except OSError as error:
        if error.errno in PASSING:
            raise
        raise AdapterRejected(name, f"cannot be read: {error.strerror}") from None


def _check_files(path: Path, base: BaseSignature, policy: AdapterPolicy, name: str, files: AdapterFiles) -> Listing:
    if not is_name(name):
        raise ValueError("the folder's name is no model name: use letters, digits, '.', '_' and '-', 128 at most")
    if name in (base.name, BASE):
        raise ValueError("this name means the base model: rename the folder")
    raw_config = parse_json(files.config, CONFIG_FILE)
    config = parse_peft_config(raw_config)
    sidecar = parse_optional(files, SIDECAR_FILE, parse_sidecar)
    verified = base_check(sidecar, base)
    defaults = generation_defaults_of(name, files, sidecar, base, policy)
    entries = weights_header(files.weights, files.weights_size)
    try:
        plan = make_plan(entries, config, base, max_rank=policy.max_rank)
    except PlanError as error:
        if sidecar is None and error.misfit:
            _refuse_other_base(raw_config.get("base_model_name_or_path"), base, error)
        raise
    if policy.max_memory is not None and plan.num_bytes > policy.max_memory:
        raise ValueError(
            f"it needs {plan.num_bytes} bytes in memory; the limit is {policy.max_memory} (setting adapter_memory)"
        )
    _check_trained_tokens(plan, defaults, base, files.unread.get(TOKENS_FILE))
    config = replace(config, trained_names=plan.trained_names)
    return Listing(
        name,
        path,
        config,
        sidecar,
        defaults,
        plan,
        files.created,
        files.unread,
        base_check=verified.check,
        base_note=verified.note,
    )


def _refuse_other_base(named: Any, base: BaseSignature, misfit: PlanError) -> None:
    """Raises ``OtherBase`` if ``adapter_config.json`` names another base, too."""
    other = other_base_name(named, base) if isinstance(named, str) and named else None
    if other is not None:
        raise OtherBase(
            f"it is for another base: {CONFIG_FILE} names {named!r:.80}, and {misfit}; this server runs {base.name}: "
            "start the server with that base",
            base=other,
        ) from None


def weights_header(data: bytes, size: int) -> Mapping[str, TensorEntry]:
    """The weights file's tensors. Raises ``ValueError`` that names the file, or the kind of file that it is instead."""
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
    """A file's JSON. Raises ``ValueError`` that names the file, or the kind of file that it is instead."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(kind_of_bytes(name, data) or f"{name} is not valid JSON: {error}") from None


def parse_optional(files: AdapterFiles, name: str, parse: Callable[[Any], Any]) -> Any:
    """An optional file, parsed; None if it is missing."""
    return None if name not in files.others else parse(parse_json(files.others[name], name))


def _object(files: AdapterFiles, name: str) -> Mapping[str, Any]:
    """The JSON object of a companion file; empty if it is missing."""
    content = parse_optional(files, name, lambda data: data)
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    return content or {}


def generation_defaults_of(
    name: str, files: AdapterFiles, sidecar: Sidecar | None, base: BaseSignature, policy: AdapterPolicy
) -> GenerationDefaults:
    """The generation defaults of sidecar and companion files.

    Raises ``ValueError`` for an untrusted template, or added tokens that cannot be served.
    """
    defaults = replace(_defaults_as_written(files, sidecar), added_tokens=_added_tokens(files, base))
    template = defaults.chat_template
    if template is None or is_same(template, base.chat_template):
        return replace(defaults, chat_template=None if template is None else base.chat_template)
    own = sidecar is not None and sidecar.chat_template is not None and SOURCE_FILE not in files.others
    if not own and not policy.trust_chat_templates and name not in policy.trusted_templates:
        raise ValueError(
            "it brings a chat template of its own, which is not trusted: set --trust-chat-templates, or "
            f"--trusted-templates {name} for this adapter alone, or remove the template from the folder "
            f"({TEMPLATE_FILE}, chat_template in {TOKENIZER_FILE}) to use the base's"
        )
    return defaults


def _defaults_as_written(files: AdapterFiles, sidecar: Sidecar | None) -> GenerationDefaults:
    """The generation defaults before the trust of the template is checked."""
    template = files.others.get(TEMPLATE_FILE)
    try:
        text = None if template is None else template.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{TEMPLATE_FILE} is not UTF-8 text") from None
    return merge_defaults(
        sidecar, CompanionFiles(text, _object(files, TOKENIZER_FILE), _object(files, GENERATION_FILE))
    )


def _added_tokens(files: AdapterFiles, base: BaseSignature) -> tuple[AddedToken, ...]:
    """The added tokens of the adapter's tokenizer; none if they are the base's or cannot be compared."""
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


def _without_redundant_tokenizer(files: AdapterFiles, base: BaseSignature) -> AdapterFiles:
    """The files without ``tokenizer.json`` if it changes nothing and the other files list no further tokens."""
    without = replace(files, tokens=b"")
    with suppress(ValueError):
        if not _added_tokens(without, base):
            return without
    return files


def _listed(tokenizer: bytes) -> tuple[AddedToken, ...]:
    """The added tokens of ``tokenizer.json``; its beginning suffices."""
    listed = listed_in_head(tokenizer)
    if listed is None:
        content = parse_json(tokenizer, TOKENS_FILE)
        listed = content.get("added_tokens", []) if isinstance(content, dict) else content
    return parse_listed(listed, TOKENS_FILE)


def _named_special(config: Mapping[str, Any]) -> set[str]:
    """The texts of tokens that are named in ``tokenizer_config.json``, such as ``eos_token``.

    transformers makes them special, whatever the tokenizer's list of added tokens says.
    """
    named = [value for name, value in config.items() if name.endswith("_token")]
    more = config.get("extra_special_tokens")
    named += more.values() if isinstance(more, dict) else []
    return {text for token in named if isinstance(text := token_text(token), str)}


def _special(config: Mapping[str, Any]) -> set[str]:
    """The texts of tokens that ``tokenizer_config.json`` makes special, by name or in a list."""
    more = [config.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    listed = [token for tokens in more if isinstance(tokens, list) for token in tokens]
    return _named_special(config) | {text for token in listed if isinstance(text := token_text(token), str)}


def check_tokenizer(files: AdapterFiles, base: BaseSignature) -> None:
    """Raises ``ValueError`` if the adapter's tokenizer gives texts other ids than the base's."""
    if not files.tokens or base.tokenizer is None:
        return
    if difference := base.tokenizer.difference(files.tokens, lambda: parse_json(files.tokens, TOKENS_FILE)):
        raise ValueError(_other_tokenizer(difference))


def _other_tokenizer(part: str) -> str:
    return (
        f"its tokenizer is not the base's: the {part} in {TOKENS_FILE} differs, so prompts would have other token ids; "
        f"serve the base that it was trained on, or remove {TOKENS_FILE} from the folder to use the base's tokenizer"
    )


def _check_trained_tokens(
    plan: AdapterPlan, defaults: GenerationDefaults, base: BaseSignature, unread: str | None
) -> None:
    """Raises ``ValueError`` for trained rows of tokens without a text.

    ``unread`` is the reason why the folder's tokenizer may not be read, if so.
    """
    trained = sorted({token for part in plan.parts.values() if part.tokens for token in part.tokens.indices})
    if base.tokenizer is None:
        return
    token = first_without_text(trained, base.tokenizer, defaults.added_tokens)
    if token is None:
        return
    problem = f"trainable_token_indices in {CONFIG_FILE} names token {token}, which the base's tokenizer does not have"
    if unread is not None:
        raise ValueError(f"{problem}, and the one in the folder cannot be read: {unread}")
    raise ValueError(
        f"{problem}: put the tokenizer that it was trained with ({TOKENS_FILE}, {TOKENIZER_FILE}) into the folder"
    )


def check_values(data: bytes, entries: Mapping[str, TensorEntry]) -> None:
    """Raises ``ValueError`` for NaN and infinity, whose exponent bits are all ones."""
    for name, entry in entries.items():
        kind, exponent = EXPONENTS[entry.dtype]
        bits = np.frombuffer(data, kind, (entry.end - entry.begin) // kind.itemsize, entry.begin)
        if ((bits & exponent) == exponent).any():
            raise ValueError(f"the weights of {name} hold NaN or infinity: train the adapter again")


def _digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()
