"""Whether an adapter was trained on the base that the server runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from adapter_format.sidecar import BaseReference, Sidecar
from base_files.sample_comparison import compare
from server.adapters.content.signature import BaseCheck, BaseSignature


class OtherBase(ValueError):
    """The adapter is for another base. ``base`` names it, or is None where it has the name of the server's base."""

    def __init__(self, reason: str, *, base: str | None) -> None:
        super().__init__(reason)
        self.base = base


@dataclass(frozen=True)
class VerifiedBase:
    """How the base was verified; ``note`` says in which format the adapter's base was, if in another one."""

    check: BaseCheck
    note: str | None = None


def base_check(sidecar: Sidecar | None, base: BaseSignature) -> VerifiedBase:
    """Verify an adapter's base by the latest fingerprint that sidecar and base both have, or by samples of both.

    Without a sidecar only shapes can be compared. Raises ``OtherBase``.
    """
    if sidecar is None:
        return VerifiedBase("shapes")
    trained_on = sidecar.base
    by_v2 = base.fingerprint_v2 is not None and trained_on.fingerprint_v2 is not None
    if by_v2 and trained_on.fingerprint_v2 == base.fingerprint_v2:
        return VerifiedBase("fingerprint_v2")
    same_v1 = trained_on.fingerprint is not None and trained_on.fingerprint == base.fingerprint
    if same_v1 and not by_v2:
        return VerifiedBase("fingerprint")
    if same_v1:
        raise _other_base(trained_on, base, ", whose weights differ though its fingerprint of version 1 is the same")
    return _check_samples(trained_on, base)


def other_base_name(name: str, base: BaseSignature) -> str | None:
    """The name of a base without folders, or None where it is one of the server's base's names."""
    own = _last_part(name)
    return None if own.casefold() in {_last_part(known).casefold() for known in base.names} else own


def _check_samples(trained_on: BaseReference, base: BaseSignature) -> VerifiedBase:
    """Whether the same weights in another format have these other fingerprints."""
    if base.samples is None or base.samples.served is None:
        raise _other_base(trained_on, base, "")
    trained, served = base.samples.of_reference(trained_on), base.samples.served
    if trained is None:
        raise _other_base(
            trained_on,
            base,
            ", and whether that is the same one in another format is unknown: the sidecar has no sample of its base, "
            f"and {trained_on.name} is neither in the hub's cache nor beside this base",
        )
    same_container = (trained_on.fingerprint is None) == (base.fingerprint is None)  # folders have a version 1
    problem = compare(trained, served, same_container=same_container)
    if problem is not None:
        raise _other_base(trained_on, base, f", and {problem}")
    note = f"trained on {trained_on.name} in {trained.weights_format}; this base has these weights in "
    return VerifiedBase("weights_sample", note + served.weights_format)


def _other_base(trained_on: BaseReference, base: BaseSignature, difference: str) -> OtherBase:
    reason = (
        f"it was trained on another base ({trained_on.name}, fingerprint {trained_on.best_fingerprint[:19]}); this "
        f"server runs {base.name} ({base.fingerprint_of(2 if trained_on.fingerprint_v2 else 1)[:19]}){difference}"
        ": start the server with that base, or train the adapter again"
    )
    return OtherBase(reason, base=other_base_name(trained_on.name, base))


def _last_part(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name or name
