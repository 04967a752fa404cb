"""OpenAI's JavaScript client in a web page: Chromium lets a page of an allowed origin use the server, and no other."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.serving import ROOT, ServerProcess, running_server

PAGE = Path(__file__).with_name("browser_page.html")
KEY = "a-key-for-a-page-of-another-origin"
REPORT_TIMEOUT = 120.0


class PageHandler(SimpleHTTPRequestHandler):
    """Serves the folder with the page, and takes the page's report."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

    def __init__(self, *given: Any, reports: Queue[dict[str, Any]], **more: Any) -> None:
        self._reports = reports
        super().__init__(*given, **more)

    def do_POST(self) -> None:
        self._reports.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *given: Any) -> None:
        """Nothing."""


class Pages:
    """A web server with the page, in which Chromium runs it. ``127.0.0.1`` and ``localhost`` are two origins."""

    def __init__(self, folder: Path, chromium: str) -> None:
        self._folder, self._chromium = folder, chromium
        self._reports: Queue[dict[str, Any]] = Queue()
        handler = partial(PageHandler, directory=str(folder), reports=self._reports)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def origin(self, host: str) -> str:
        return f"http://{host}:{self.port}"

    def report_of(self, host: str, server: ServerProcess) -> dict[str, Any]:
        """What the page reports, opened under a host name."""
        query = urlencode({"base": f"{server.url}/v1", "key": KEY})
        profile = self._folder.with_name(f"profile-{host}")
        command = [self._chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", f"{self.origin(host)}/{PAGE.name}?{query}"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return self._reports.get(timeout=REPORT_TIMEOUT)
        finally:
            browser.terminate()
            browser.wait(30)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(scope="module")
def pages(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("browser") / "site"
    folder.mkdir()
    shutil.copy(PAGE, folder)
    install = [tool("npm"), "install", "--no-audit", "--no-fund", "openai@6"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made = Pages(folder, tool("chromium"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(pages: Pages) -> Iterator[ServerProcess]:
    flags = ("--api-key", KEY, "--allow-origin", pages.origin("localhost"))
    with running_server("--adapters-dir", str(ROOT / "adapters"), *flags) as running:
        yield running


def test_a_page_of_an_allowed_origin_uses_the_client_as_any_program_does(pages: Pages, server: ServerProcess) -> None:
    report = pages.report_of("localhost", server)
    assert "helpdesk" in report["models"]
    assert report["whole"]["text"] and report["streamed"]["text"]
    assert report["whole"]["adapter"].startswith("helpdesk@")
    assert report["whole"]["requestId"]


def test_the_page_is_told_why_it_is_refused(pages: Pages, server: ServerProcess) -> None:
    report = pages.report_of("localhost", server)
    refused = {"error": "NotFoundError", "status": 404, "code": "model_not_found", "requestID": True}
    assert report["unknown"] == refused
    wrong = {"error": "AuthenticationError", "status": 401, "code": "invalid_api_key", "requestID": True}
    assert report["wrongKey"] == wrong


def test_a_page_of_another_origin_gets_nothing(pages: Pages, server: ServerProcess) -> None:
    report = pages.report_of("127.0.0.1", server)
    assert {attempt["error"] for attempt in report.values()} == {"APIConnectionError"}
