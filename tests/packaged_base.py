"""A small packaged base for tests: a wheel, and an index on the loopback that pip takes it from."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from base_files.packaged import PackagedBase

MODEL = b"GGUF" + bytes(range(256)) * 4000
TINY = PackagedBase(
    hub_id="org/Tiny",
    name="tiny",
    description="a file of 1 MB",
    licence="Apache-2.0",
    package="tiny-base",
    version="0.1.2",
    wheel="tiny_base-0.1.2-py3-none-any.whl",
    wheel_bytes=1_100_000,
    member="tiny_base/tiny.Q4_1.gguf",
    num_bytes=len(MODEL),
    sha256=hashlib.sha256(MODEL).hexdigest(),
    sampling={"temperature": 0.5},
)


def write_wheel(folder: Path, *, model: bytes | None = MODEL) -> Path:
    """The wheel of ``TINY``. It requires what no index has, and its code raises when it is imported."""
    info = f"{TINY.member.partition('/')[0]}-{TINY.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {TINY.package}\nVersion: {TINY.version}\nRequires-Dist: no-such-package\n"
    files: dict[str, bytes] = {
        "tiny_base/__init__.py": b"raise RuntimeError('imported')",
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    if model is not None:
        files[TINY.member] = model
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TINY.wheel
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


@dataclass
class Index:
    """What it holds, and where. Where it ``stalls``, the second half of the wheel waits until it is closed."""

    wheel: Path
    stalls: bool = False
    url: str = ""
    asked: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def running_index(index: Index) -> Iterator[Index]:
    """Serve ``index`` as pip expects a simple repository: a page of links for each package."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.asked.append(self.path)
            if self.path == f"/simple/{TINY.package}/":
                self._send("text/html", f'<a href="/{TINY.wheel}">{TINY.wheel}</a>'.encode())
            elif self.path == f"/{TINY.wheel}":
                self._send("application/octet-stream", index.wheel.read_bytes(), stalls=index.stalls)
            else:
                self.send_error(404)

        def _send(self, kind: str, body: bytes, *, stalls: bool = False) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            half = len(body) // 2
            with contextlib.suppress(OSError):
                self.wfile.write(body[:half])
                if stalls:
                    self.wfile.flush()
                    index.closed.wait(60)
                self.wfile.write(body[half:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index.url = f"http://127.0.0.1:{server.server_port}/simple"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield index
        finally:
            index.closed.set()
            server.shutdown()
            thread.join()
