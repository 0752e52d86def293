"""The doctor asks the Ray cluster that a variable names, and tells a wrong address from a token that is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest

from pipeline.doctor import doctor
from pipeline.doctor.check import Check


class _Head(BaseHTTPRequestHandler):
    """The HTTP interface of a cluster. It knows one path, and wants a token below /private."""

    def do_GET(self) -> None:
        prefix, _, path = self.path.rpartition("/api/")
        status = 404 if path != "version" or prefix not in ("", "/private") else 403 if prefix else 200
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": version("ray")}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def head() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Head) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ray_at(address: str, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    return next(check for check in doctor.checks() if check.name == "Ray")


def test_an_address_may_end_with_a_slash(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for end in ("", "/"):
        found = ray_at(head + end, monkeypatch)
        assert (found.status, found.found) == ("ok", f"Ray {version('ray')}; the cluster at {head} answers")


@pytest.mark.parametrize(
    ("path", "status", "remedy"),
    [("/private", 403, "RAY_AUTH_TOKEN"), ("/other", 404, "correct RAY_API_SERVER_ADDRESS")],
)
def test_a_token_is_asked_for_where_one_is_refused(
    head: str, path: str, status: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ray_at(head + path, monkeypatch)
    assert found.status == "fail"
    assert f"HTTP status {status}" in found.found
    assert remedy in found.remedy
    assert ("TOKEN" in found.remedy) == (status == 403)
