"""The way of one request: source files, threads, tasks, queues and wake-ups between the socket and the answer.

    python -m benchmarks.request_path [--base micro] [--quantization int8] [--model helpdesk]

A server with an adapter runs in this process and has answered a few requests. Then one streamed chat request is
traced: which source files of the server have code that runs for it, on any thread. A kernel runs as machine code, so
the files of its body and of the functions inlined into it are counted by name. Replayed layers launch the kernels that
were launched when they were recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import uvicorn

from base_files.names import BASE_MODEL_HELP, EMBEDDED_BASE, base_name
from benchmarks.parts.bases import HELPDESKS, base_argument
from server.api.auth.access import Access
from server.cli.serve import build, uvicorn_config
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "adapter_format", "base_files", "cpu_kernels")
NUM_WARM_UPS = 4
_ANSWERED = 0.2
"""Seconds after the last byte in which the server closes the request, and the engine goes idle."""


@dataclass
class RequestPath:
    """What ran for one request. ``files`` ran Python; ``kernel_files`` hold the kernels, and what is inlined there."""

    files: set[str] = field(default_factory=set)
    kernel_files: set[str] = field(default_factory=set)
    threads: set[int] = field(default_factory=set)
    num_callbacks: int = 0
    num_tasks: int = 0
    num_queues: int = 0
    num_handovers: int = 0
    num_tokens: int = 0

    @property
    def all_files(self) -> set[str]:
        """Files of Python and of kernels."""
        return self.files | self.kernel_files

    def report(self) -> str:
        """Counts, and the files by package."""
        packages = Counter(name.rpartition("/")[0] for name in self.all_files)
        lines = [
            f"{len(self.all_files)} files: {len(self.files)} run as Python, "
            f"{len(self.kernel_files - self.files)} more are kernels",
            f"{len(self.threads)} threads, {self.num_tasks} tasks, {self.num_queues} queues of asyncio",
            f"{self.num_tokens} tokens: {self.num_handovers} hand-overs from threads to the event loop, "
            f"{self.num_callbacks} callbacks in it ({self.num_callbacks / max(1, self.num_tokens):.1f} a token)",
        ]
        for package, count in sorted(packages.items()):
            names = sorted(name for name in self.all_files if name.rpartition("/")[0] == package)
            lines.append(f"{count:4} {package}: {', '.join(name.rpartition('/')[2][:-3] for name in names)}")
        return "\n".join(lines)


class Tracer:
    """Profiles every thread that is started while it is installed, and the one that installs it."""

    def __init__(self) -> None:
        self.path = RequestPath()
        self.recording = False
        self._kernels: set[CodeType] = set()
        self._roots = tuple(f"{ROOT / package}/" for package in PACKAGES)

    def __enter__(self) -> Tracer:
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            if self.recording and argument.__name__ == "call_soon_threadsafe":
                self.path.num_handovers += 1
            return
        if event != "call":
            return
        file = frame.f_globals.get("__file__") or frame.f_code.co_filename
        if file.startswith(self._roots):
            self._on_own_code(frame, file)
        elif self.recording and "/asyncio/" in file:
            self._on_asyncio(frame.f_code.co_qualname)

    def _on_own_code(self, frame: FrameType, file: str) -> None:
        if frame.f_code.co_name == "__call__":
            body = getattr(frame.f_locals.get("kernel"), "body", None)  # of a launcher's call
            if isinstance(body, FunctionType) and body.__code__ not in self._kernels:
                self._kernels.add(body.__code__)
                self.path.kernel_files.update(self._names(_inlined(body)))
        if self.recording:
            self.path.files.add(str(Path(file).relative_to(ROOT)))
            self.path.threads.add(threading.get_ident())

    def _on_asyncio(self, name: str) -> None:
        path = self.path
        path.num_callbacks += name == "Handle._run"
        path.num_tasks += name == "BaseEventLoop.create_task"
        path.num_queues += name == "Queue.__init__"
        path.num_handovers += name == "BaseEventLoop.call_soon_threadsafe"

    def _names(self, codes: Iterator[CodeType]) -> set[str]:
        files = {code.co_filename for code in codes}
        return {str(Path(file).relative_to(ROOT)) for file in files if file.startswith(self._roots)}


def _inlined(body: FunctionType) -> Iterator[CodeType]:
    """A kernel's code, and that of every function of Python that it calls as machine code."""
    waiting, seen = [body], set[int]()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function.__code__
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        for value in (*cells, *named):
            for candidate in (value, getattr(value, "py_func", None), getattr(value, "_defn", None)):
                if isinstance(candidate, FunctionType):
                    waiting.append(candidate)


def chat(port: int, body: dict[str, Any]) -> int:
    """Ask, and read the stream to its end; the tokens of the answer."""
    sys.setprofile(None)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200 or not text.endswith("data: [DONE]\n\n"):
        raise RuntimeError(f"no stream with an end but: {response.status} {text[-500:]}")
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if "usage" in line]
    return int(events[-1]["usage"]["completion_tokens"])


def chat_body(model: str, number: int, max_tokens: int) -> dict[str, Any]:
    """A request whose prompt begins unlike that of any other number, so that no prefix of it is cached."""
    words = " ".join(f"{number}-{place}" for place in range(12))
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{words}: how do I send it back?"}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask_traced(server: uvicorn.Server, tracer: Tracer, model: str, max_tokens: int) -> None:
    loop = asyncio.get_running_loop()
    while not server.started:
        await asyncio.sleep(0.01)
    for task in asyncio.all_tasks():
        if "AdapterWatcher" in str(task.get_coro()):
            task.cancel()  # it would look at the folders in between
    port = server.servers[0].sockets[0].getsockname()[1]

    def ask_all() -> None:
        for number in range(NUM_WARM_UPS):
            chat(port, chat_body(model, number, max_tokens))
        time.sleep(_ANSWERED)
        tracer.recording = True
        tracer.path.num_tokens = chat(port, chat_body(model, NUM_WARM_UPS, max_tokens))
        time.sleep(_ANSWERED)
        tracer.recording = False

    with ThreadPoolExecutor(1) as client:
        await loop.run_in_executor(client, ask_all)


async def _serve(server: uvicorn.Server, tracer: Tracer, model: str, max_tokens: int) -> None:
    serving = asyncio.create_task(server.serve())
    asking = asyncio.create_task(_ask_traced(server, tracer, model, max_tokens))
    await asyncio.wait((serving, asking), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    if not server.started:
        asking.cancel()
        raise RuntimeError("the server did not start")
    await asking


def trace_request(settings: Settings, model: str, *, max_tokens: int = 32) -> RequestPath:
    """Serve, warm up, and trace one request to ``model``."""
    with Tracer() as tracer:
        config = uvicorn_config(build(settings, Access()))
        config.port = 0
        asyncio.run(_serve(uvicorn.Server(config), tracer, model, max_tokens))
    return tracer.path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=base_argument, default=EMBEDDED_BASE, help=BASE_MODEL_HELP)
    parser.add_argument("--quantization", default="int8", choices=("none", "int8"))
    parser.add_argument("--adapters", type=Path, default=ROOT / "adapters", help="a folder of adapters")
    parser.add_argument("--model", help="the adapter that is asked; default: the helpdesk of this base, or the base")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    options.model = options.model or HELPDESKS.get(options.base, base_name(options.base))
    return options


def main() -> None:
    """Trace a request, and print what ran."""
    options = parse()
    settings = Settings(
        base_model=options.base,
        adapters_dir=options.adapters,
        demo_adapters=False,
        quantization=options.quantization,
    )
    print(trace_request(settings, options.model, max_tokens=options.max_tokens).report())


if __name__ == "__main__":
    main()
