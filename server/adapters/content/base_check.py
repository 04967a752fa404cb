"""Whether an adapter was trained on the base that the server runs."""

from __future__ import annotations

from pathlib import PurePosixPath

from adapter_format.sidecar import BaseReference, Sidecar
from server.adapters.content.signature import BaseCheck, BaseSignature


class OtherBase(ValueError):
    """The adapter is for another base. ``base`` names it, or is None where it has the name of the server's base."""

    def __init__(self, reason: str, *, base: str | None) -> None:
        super().__init__(reason)
        self.base = base


def base_check(sidecar: Sidecar | None, base: BaseSignature) -> BaseCheck:
    """Verify an adapter's base by the latest fingerprint that sidecar and base both have.

    Without a sidecar only shapes can be compared. Raises ``OtherBase``.
    """
    if sidecar is None:
        return "shapes"
    trained_on = sidecar.base
    by_v2 = base.fingerprint_v2 is not None and trained_on.fingerprint_v2 is not None
    if by_v2 and trained_on.fingerprint_v2 == base.fingerprint_v2:
        return "fingerprint_v2"
    same_v1 = trained_on.fingerprint is not None and trained_on.fingerprint == base.fingerprint
    if same_v1 and not by_v2:
        return "fingerprint"
    raise _other_base(trained_on, base, same_v1=same_v1)


def other_base_name(name: str, base: BaseSignature) -> str | None:
    """The name of a base without folders, or None where it is one of the server's base's names."""
    own = _last_part(name)
    return None if own.casefold() in {_last_part(known).casefold() for known in base.names} else own


def _other_base(trained_on: BaseReference, base: BaseSignature, *, same_v1: bool) -> OtherBase:
    reason = (
        f"it was trained on another base ({trained_on.name}, fingerprint {trained_on.best_fingerprint[:19]}); this "
        f"server runs {base.name} ({base.fingerprint_of(2 if trained_on.fingerprint_v2 else 1)[:19]})"
        + (", whose weights differ though its fingerprint of version 1 is the same" if same_v1 else "")
        + ": start the server with that base, or train the adapter again"
    )
    return OtherBase(reason, base=other_base_name(trained_on.name, base))


def _last_part(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name or name
