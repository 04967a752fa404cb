"""Which models a request's ``model`` names: the base, or adapters with versions and weights.

Looked up in this order: the exact name of the base, of an adapter or of an alias; the grammar of ``names`` over such
names; what other servers and clients write for the same model (``_readings``). The last step is taken only if exactly
one model is meant. A model that the key may not use does not exist for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from server.adapters.aliases import Alias
from server.adapters.names import MAX_MODEL_CHARS, MAX_PARTS, MAX_SCALE, ModelRef, is_name, parse_model
from server.adapters.registry import AdapterRegistry
from server.errors import InvalidRequest, ModelNotFound, QuickchangeError

MAX_NEAREST, MAX_COMPARED, MAX_ALIGNED, MAX_COMPARED_CHARS = 3, 500, 20, 64
"""Names in an error; names compared for it by pairs of characters, which is fast, and then by alignment, which takes
30 us each; and characters compared of each.
"""
MAX_READINGS = 64

MayUse = Callable[[str], bool]
"""Whether a key may use the adapter of this name."""


def anything(name: str) -> bool:
    """``MayUse`` without limits."""
    return True


@dataclass(frozen=True)
class Resolved:
    """``refs`` are the adapters, none for the base. ``name`` is the exact name, None if ``refs`` follow the grammar."""

    refs: tuple[ModelRef, ...]
    name: str | None = None


class ModelNames:
    """The names of a server: of its base, adapters and aliases. The first of ``base_names`` is shown to clients."""

    def __init__(self, registry: AdapterRegistry, base_names: Sequence[str]) -> None:
        self._registry = registry
        self.base_names = tuple(dict.fromkeys(base_names))
        self.aliases: Mapping[str, Alias] = {}

    @property
    def base_name(self) -> str:
        return self.base_names[0]

    def resolve(self, text: str, *, user: str | None = None, may_use: MayUse = anything) -> Resolved:
        """What a model text means; of a weighted alias the target of this user.

        Adapters with a version need not exist. Raises ``ModelNotFound``, and ``InvalidRequest`` for a syntax error.
        """
        found = self._exact(text, user, may_use)
        if found is not None:
            return found
        try:
            refs = self._parse(text, user, may_use)
        except (ModelNotFound, InvalidRequest) as error:
            return self._converted(text, user, may_use, error)
        if any(ref.name == self.base_name for ref in refs):
            raise InvalidRequest(
                f"Invalid 'model': {self.base_name!r} is the base, which has no version and no weight, and is a part "
                "of every adapter already; name it alone, or the adapters without it.",
                param="model",
            )
        if all(ref.name in self._registry and may_use(ref.name) for ref in refs):
            return Resolved(refs)
        return self._converted(text, user, may_use, None)

    def visible(self, may_use: MayUse) -> Iterator[str]:
        """The names that a key may use: base, adapters, aliases."""
        yield self.base_name
        yield from (entry.name for entry in self._registry if may_use(entry.name))
        yield from (alias.name for alias in self.visible_aliases(may_use))

    def visible_aliases(self, may_use: MayUse) -> list[Alias]:
        """The aliases by name that a key may use."""
        return [self.aliases[name] for name in sorted(self.aliases) if self._alias(name, may_use) is not None]

    def nearest(self, text: str, may_use: MayUse = anything) -> list[str]:
        """The visible names that are most like a text."""
        wanted = text[:MAX_COMPARED_CHARS].casefold()
        names = list(self.visible(may_use))
        if len(names) > MAX_COMPARED:
            alike = [name for name in names if name[:2].casefold() == wanted[:2]]
            names = [*names[:1], *alike, *names[1:]][:MAX_COMPARED]
        pairs = _pairs(wanted)
        matcher = SequenceMatcher(None, b=wanted)

        def common_pairs(name: str) -> int:
            return len(pairs & _pairs(name[:MAX_COMPARED_CHARS].casefold()))

        def likeness(name: str) -> float:
            matcher.set_seq1(name[:MAX_COMPARED_CHARS].casefold())
            return matcher.ratio()

        likely = sorted(dict.fromkeys(names), key=common_pairs, reverse=True)[:MAX_ALIGNED]
        return sorted(likely, key=likeness, reverse=True)[:MAX_NEAREST]

    def _exact(self, name: str, user: str | None, may_use: MayUse) -> Resolved | None:
        if name == self.base_name:
            return Resolved((), name)
        if name in self._registry and may_use(name):
            return Resolved((ModelRef(name),), name)
        alias = self._alias(name, may_use)
        return None if alias is None else Resolved(self._target(alias, user), name)

    def _alias(self, name: str, may_use: MayUse) -> Alias | None:
        """An alias whose targets the key may use, all of them: which one a request gets, its user decides.

        None also for a name that the base or an adapter has, whether or not the key may use that adapter.
        """
        alias = self.aliases.get(name)
        if alias is None or name == self.base_name or name in self._registry:
            return None
        return alias if all(may_use(target) for target in alias.adapters if target != self.base_name) else None

    def _target(self, alias: Alias, user: str | None) -> tuple[ModelRef, ...]:
        model = alias.choose(user)
        return () if model == self.base_name else parse_model(model)

    def _parse(self, text: str, user: str | None, may_use: MayUse) -> tuple[ModelRef, ...]:
        """The grammar, in which aliases may stand for adapters. What it says of the base is not checked."""

        def is_model(name: str) -> bool:
            return is_name(name) or name == self.base_name or self._alias(name, may_use) is not None

        written = parse_model(text, is_model=is_model)
        refs: list[ModelRef] = []
        for ref in written:
            alias = self._alias(ref.name, may_use)
            refs += (ref,) if alias is None else _weighted(self._target(alias, user), ref)
        if len(refs) > MAX_PARTS or len({(ref.name, ref.version) for ref in refs}) < len(refs):
            raise InvalidRequest(
                f"Invalid 'model': its aliases stand for an adapter twice, or for more than {MAX_PARTS} adapters.",
                param="model",
            )
        return tuple(refs)

    def _converted(self, text: str, user: str | None, may_use: MayUse, error: QuickchangeError | None) -> Resolved:
        """The model in another server's spelling. Raises ``error``, or ``ModelNotFound`` for the first unknown name.

        An adapter with a version may be kept on disk only, so it is returned even if its name is unknown.
        """
        pieces = _pieces(text)
        found = [self._piece(piece, user, may_use) for piece in pieces]
        if len(found) == 1 and found[0] is not None:
            return found[0]
        if len(found) > 1 and all(each is not None and each.refs for each in found):
            refs = tuple(ref for each in found if each is not None for ref in each.refs)
            if len(refs) <= MAX_PARTS and len({(ref.name, ref.version) for ref in refs}) == len(refs):
                return Resolved(refs)
        if error is not None:
            names = [name for piece in pieces for name, _ in _addresses(piece) if name != self.base_name]
            if pieces and not any(self._exact(name, user, may_use) for name in names):
                raise ModelNotFound(text[:200])  # such as 'llama3:8b', whose tag is not a wrong weight
            raise error
        return Resolved(self._parse(text, user, may_use))

    def _piece(self, piece: str, user: str | None, may_use: MayUse) -> Resolved | None:
        """An adapter of a composition, or a whole model: as it is, then in another spelling, then in another case."""
        addresses = [address for reading in _readings(piece, self.base_names) for address in _addresses(reading)]
        exact = list(_addresses(piece))
        for candidates in (exact, addresses, self._in_other_case([*exact, *addresses], may_use)):
            found = {}
            for name, suffix in candidates:
                resolved = self._with_suffix(name, suffix, user, may_use)
                if resolved is not None:
                    found[name if resolved.refs else self.base_name, suffix] = resolved
            if found:
                return next(iter(found.values())) if len(found) == 1 else None
        return None

    def _in_other_case(self, addresses: Sequence[tuple[str, str]], may_use: MayUse) -> Iterator[tuple[str, str]]:
        """The addresses with every visible name that differs in case alone; lazy, as it looks at all names."""
        names: dict[str, list[str]] = {}
        for name in (*self.base_names, *self.visible(may_use)):
            names.setdefault(name.casefold(), []).append(name)
        for name, suffix in addresses:
            yield from ((other, suffix) for other in names.get(name.casefold(), ()))

    def _with_suffix(self, name: str, suffix: str, user: str | None, may_use: MayUse) -> Resolved | None:
        """A name with what follows it: ``@version``, ``:weight``, both or nothing."""
        if name in self.base_names and not suffix:
            return Resolved((), self.base_name)
        exact = self._exact(name, user, may_use)
        if exact is None or not suffix:
            return exact
        try:
            refs = self._parse(name + suffix, user, may_use)
        except (ModelNotFound, InvalidRequest):
            return None
        return None if any(ref.name == self.base_name for ref in refs) else Resolved(refs)


def _pairs(text: str) -> set[str]:
    return {text[start : start + 2] for start in range(len(text) - 1)}


def _weighted(target: tuple[ModelRef, ...], ref: ModelRef) -> tuple[ModelRef, ...]:
    """The adapters of an alias that has a version or a weight in a composition."""
    if not target:
        raise InvalidRequest(f"Invalid 'model': the alias {ref.name!r} is the base; name it alone.", param="model")
    if ref.version is not None:
        if len(target) > 1 or target[0].version is not None:
            raise InvalidRequest(
                f"Invalid 'model': the alias {ref.name!r} has a version already, or is a composition; name the adapter "
                "with its version instead.",
                param="model",
            )
        target = (replace(target[0], version=ref.version),)
    weighted = tuple(replace(each, scale=each.scale * ref.scale) for each in target)
    if any(abs(each.scale) > MAX_SCALE for each in weighted):
        raise InvalidRequest(
            f"Invalid 'model': the weight of {ref.name!r} times the weight in its alias is beyond {MAX_SCALE:g}.",
            param="model",
        )
    return weighted


def _pieces(text: str) -> list[str]:
    """The parts of a composition; nothing where it is too long to be one."""
    pieces = text.split("+") if len(text) <= MAX_MODEL_CHARS else []
    return pieces if len(pieces) <= MAX_PARTS and all(pieces) else []


def _addresses(piece: str) -> Iterator[tuple[str, str]]:
    """Names, and the ``@version`` and ``:weight`` behind each; a name may have these signs itself."""
    yield piece, ""
    end = min(at for at in (piece.find("@"), piece.find(":"), len(piece)) if at >= 0)
    if end < len(piece):
        yield piece[:end], piece[end:]


def _readings(piece: str, base_names: Sequence[str]) -> list[str]:
    """What a piece is without Ollama's tag, a provider's prefix, and the base before its adapter."""
    readings = [piece]
    for reading in readings:  # grows while it is read
        more = [reading.removesuffix(":latest")] if reading.endswith(":latest") else []
        provider, _, rest = reading.partition("/")
        more += [rest] if is_name(provider) else []  # a path is no name with a provider
        for base in base_names:
            if reading.casefold().startswith(f"{base.casefold()}:"):
                more.append(reading[len(base) :].lstrip(":"))
        readings += [each for each in more if each and each not in readings]
        if len(readings) > MAX_READINGS:
            break
    return readings[1:]
