"""Samples of the server's base, and of bases on this machine that sidecars without a sample name."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

from adapter_format.sidecar import BaseReference
from base_files.errors import BaseFilesError
from base_files.locate import local_bases
from base_files.source import BaseSource, Fingerprints
from base_files.weights_sample import WeightsSample, sample_of

logger = logging.getLogger("quickchange.adapters")


class BaseSamples:
    """Each sample and fingerprint is read once, when the first adapter needs it; one thread at a time."""

    def __init__(self, source: BaseSource) -> None:
        self._source = source
        self._known: dict[BaseReference, WeightsSample] = {}
        self._fingerprints: dict[Path, Fingerprints | None] = {}

    @cached_property
    def served(self) -> WeightsSample | None:
        """That of the server's base; None if it cannot be sampled."""
        return _read(self._source)

    def of_reference(self, trained_on: BaseReference) -> WeightsSample | None:
        """That in the sidecar, or of the base that it names, by fingerprint; None if that is not on this machine.

        Raises ``ValueError`` for a sample that is malformed.
        """
        if trained_on.sample is not None:
            return WeightsSample.parse(trained_on.sample.model_dump())
        if trained_on not in self._known:
            for source in local_bases(trained_on.name, near=self._source.path.parent):
                if self._has_fingerprint(source, trained_on) and (sample := _read(source)) is not None:
                    self._known[trained_on] = sample
                    break
        return self._known.get(trained_on)

    def _has_fingerprint(self, source: BaseSource, trained_on: BaseReference) -> bool:
        if source.path not in self._fingerprints:
            self._fingerprints[source.path] = _fingerprints_of(source)
        fingerprints = self._fingerprints[source.path]
        if fingerprints is None:
            return False
        if trained_on.fingerprint_v2 is not None:
            return fingerprints.v2 == trained_on.fingerprint_v2
        return fingerprints.v1 == trained_on.fingerprint


def _read(source: BaseSource) -> WeightsSample | None:
    try:
        return sample_of(source)
    except BaseFilesError as error:
        logger.warning("base %s cannot be compared with others: %s", source.name, error)
        return None


def _fingerprints_of(source: BaseSource) -> Fingerprints | None:
    try:
        return source.fingerprints()
    except BaseFilesError:
        return None  # an incomplete download, for example
