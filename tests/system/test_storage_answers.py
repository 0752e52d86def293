"""What a server answers that is busy, has another clock, or is none of S3: waiting helps, and nothing is missing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.errors import EnvironmentFault, LastingFault
from pipeline.runs.owner import require_owner
from pipeline.storage import files, filesystems
from tests.faults.storage_proxy import fault_proxy

pytestmark = pytest.mark.system

Answer = tuple[int, str]  # status and body

CALLS: dict[str, Callable[[str], object]] = {
    "list": files.list_names,
    "read": lambda url: files.read_bytes(f"{url}/a"),
    "write": lambda url: files.write_bytes(f"{url}/a", b"1"),
    "own": lambda url: require_owner(url, 1),
}


@contextmanager
def http_server(answer: Callable[[str, str], Answer]) -> Iterator[str]:
    """URL of a server that answers (method, path) with a status and a body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # clients wait for an answer before they send a body

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answer(self.command, self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body.encode())

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("call", CALLS)
def test_a_proxy_that_does_not_know_its_servers_hides_nothing(
    s3: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A driver would else believe that it has lost its run, and a worker that there is no checkpoint."""
    with http_server(lambda *_: (404, "default backend - 404")) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(EnvironmentFault) as caught:
            CALLS[call]("s3://bucket/runs")
    assert not isinstance(caught.value, LastingFault)


@pytest.mark.parametrize("call", CALLS)
def test_a_clock_that_is_wrong_is_no_refusal(s3: Any, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    body = "<Error><Code>RequestTimeTooSkewed</Code><Message>x</Message></Error>"
    with http_server(lambda *_: (403, body)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(EnvironmentFault, match="clock of this machine") as caught:
            CALLS[call]("s3://bucket/runs")
    assert not isinstance(caught.value, LastingFault)


def test_a_request_that_was_silent_once_is_read_at_the_second_try(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.bucket()
    files.write_bytes(f"{bucket}/manifest.json", bytes(30_000))
    for module in (files, filesystems):
        monkeypatch.setattr(module, "SILENCE_S", 1)
    filesystems.forget_clients()
    try:
        with fault_proxy(s3.url) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url())
            proxy.inject("slow_first_byte", "*/manifest.json", seconds=3)
            assert files.read_at_most(f"{bucket}/manifest.json", 100_000) == bytes(30_000)
            assert proxy.counts()["slow_first_byte"] == 1
    finally:
        filesystems.forget_clients()


@pytest.mark.parametrize("failures", [3, 12])
def test_a_role_whose_server_was_busy_is_found(s3: Any, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """At once where the server is busy for moments, and by the next call where it is busy for longer."""
    bucket, left = s3.bucket(), [failures]
    role = {"Code": "Success", "AccessKeyId": s3.credentials.key_id, "SecretAccessKey": s3.credentials.secret}
    role |= {"Token": "", "Expiration": "2999-01-01T00:00:00Z"}

    def metadata(method: str, path: str) -> Answer:
        if left[0]:
            left[0] -= 1
            return 503, "busy"
        if method == "PUT":
            return 200, "a token"
        return 200, "role" if path.endswith("/security-credentials/") else json.dumps(role)

    with http_server(metadata) as url:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
            monkeypatch.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, "/nowhere")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        if failures > 5:
            with pytest.raises(EnvironmentFault, match="no credentials"):
                files.list_names(f"{bucket}/runs")
        assert files.list_names(f"{bucket}/runs") == []
