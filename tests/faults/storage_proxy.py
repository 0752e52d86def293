"""A proxy in front of a real S3 or MLflow server that fails as servers and networks do, as it is told while it runs.

    with fault_proxy(s3.url) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url()
        proxy.inject("burst_503", "*.tar", times=3)     # the next three reads of shards
        proxy.random(0.01, seed=0)                      # and one request in a hundred, in some way
        proxy.latency(0.2)                              # and every answer 200 ms late

It runs in a process of its own: what it costs is not counted as its client's. Signatures stay good, since the client
signs for the proxy's address, and that `Host` is passed on.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler
from multiprocessing import get_context, parent_process
from multiprocessing.managers import BaseManager
from typing import cast
from urllib.parse import unquote, urlsplit

# Before anything is answered, to any request; `refused` closes the port too, for its `seconds`.
REQUEST_FAULTS = ("refused", "burst_500", "burst_503", "slow_first_byte", "object_missing", "credentials_revoked")
# To the body of an answered GET; `slow_body` and `slow_first_byte` take `seconds`.
BODY_FAULTS = ("reset_mid_body", "truncated_body", "flipped_byte", "object_replaced", "slow_body")
# What passes by itself, as `random` has it unless told otherwise.
PASSING = ("refused", "burst_500", "burst_503", "reset_mid_body", "truncated_body", "flipped_byte")

_ERRORS = {
    "burst_500": (500, "InternalError"),
    "burst_503": (503, "SlowDown"),
    "object_missing": (404, "NoSuchKey"),
    "credentials_revoked": (403, "InvalidAccessKeyId"),
}
_CHUNK = 1 << 20
_PIECES = 50  # of a slow body


@dataclass
class _Rule:
    fault: str
    object: str
    seconds: float
    left: float  # requests

    def applies(self, method: str, key: str) -> bool:
        return self.left > 0 and fnmatch(key, self.object) and (method == "GET" or self.fault in REQUEST_FAULTS)


@dataclass
class _Chance:
    share: float
    faults: Sequence[str]
    object: str
    dice: random.Random

    def applies(self, key: str) -> bool:
        return fnmatch(key, self.object) and self.dice.random() < self.share


class FaultProxy:
    """Objects are patterns over `bucket/key`. The first rule that applies decides; each request meets one fault."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.latency_s = 0.0
        self._rules: list[_Rule] = []
        self._chances: list[_Chance] = []
        self._counts: Counter[str] = Counter()
        self._last = 0.0
        self._refusing_until = 0.0
        self._changed = threading.Condition()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    # --- what it is told and asked -----------------------------------------------------------------------------------

    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def inject(self, fault: str, object: str = "*", times: float = 1, seconds: float = 0.0) -> None:
        """Answer the next `times` matching requests (math.inf: all) with `fault`."""
        with self._changed:
            self._rules.append(_Rule(fault, object, seconds, times))

    def random(self, share: float, seed: int, object: str = "*", faults: Sequence[str] = PASSING) -> None:
        """Answer a `share` of the matching requests with one of `faults`, drawn in the order in which they arrive."""
        with self._changed:
            self._chances.append(_Chance(share, faults, object, random.Random(seed)))

    def latency(self, seconds: float) -> None:
        """Hold every answer back for so long."""
        self.latency_s = seconds

    def clear(self) -> None:
        """No more faults. Counts stay."""
        with self._changed:
            self._rules.clear()
            self._chances.clear()
        self.latency_s = self._last = 0.0

    def counts(self) -> dict[str, int]:
        """How often each fault was met, and under "requests" how many requests there were."""
        with self._changed:
            return dict(self._counts)

    def last(self) -> float:
        """When the latest fault since `clear` was met, or over where it lasts, on the clock of time.monotonic()."""
        return self._last

    def wait_for(self, fault: str, times: int = 1, timeout_s: float = 60.0) -> bool:
        """Until `fault` has been met so often; False where that takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._counts[fault] >= times, timeout_s)

    # --- for the connections -----------------------------------------------------------------------------------------

    def choose(self, method: str, key: str) -> tuple[str, float]:
        """The fault of this request ("" for none) and its seconds."""
        with self._changed:
            self._counts["requests"] += 1
            if time.monotonic() < self._refusing_until:
                return "refused", 0.0
            for rule in self._rules:
                if rule.applies(method, key):
                    rule.left -= 1
                    return rule.fault, rule.seconds
            for chance in self._chances:
                if chance.applies(key):
                    fault = chance.dice.choice(chance.faults)
                    return fault if method == "GET" or fault in REQUEST_FAULTS else "burst_503", 0.0
        return "", 0.0

    def met(self, fault: str, seconds: float = 0.0) -> None:
        """It has begun, and goes on for `seconds`."""
        with self._changed:
            self._counts[fault] += 1
            self._last = max(self._last, time.monotonic() + seconds)
            self._changed.notify_all()

    def refuse(self, seconds: float) -> None:
        """Close the port for so long."""
        if seconds > 0:
            self._refusing_until = time.monotonic() + seconds
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts

    def _accept(self) -> None:
        while True:
            with self._listener, suppress(OSError):
                while True:
                    connection, address = self._listener.accept()
                    threading.Thread(target=_Connection, args=(connection, address, self), daemon=True).start()
            time.sleep(max(0.0, self._refusing_until - time.monotonic()))
            self._listener = socket.create_server(("127.0.0.1", self._port))


class _Connection(BaseHTTPRequestHandler):
    """One client's connection and ours to the server behind it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def __init__(self, connection: socket.socket, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        with connection, suppress(OSError, http.client.HTTPException):
            super().__init__(connection, address, None)  # type: ignore[arg-type]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, seconds = self.proxy.choose(self.command, unquote(urlsplit(self.path).path.lstrip("/")))
        time.sleep(self.proxy.latency_s)
        if fault == "slow_first_byte":
            self.proxy.met(fault, seconds)
            time.sleep(seconds)
        elif fault == "refused":
            self.proxy.refuse(seconds)
            self.proxy.met(fault, seconds)
            self._reset()
            return
        elif fault in _ERRORS:
            self.proxy.met(fault)
            self._error(*_ERRORS[fault])
            return
        self._forward(body, fault, seconds)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = answer

    def _forward(self, body: bytes, fault: str, seconds: float) -> None:
        # A connection for each request, since MLflow's server closes one that is idle for seconds.
        with closing(http.client.HTTPConnection(self.proxy.upstream)) as behind:
            behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":  # answered by us already
                    behind.putheader(name, value)
            behind.endheaders(body or None)
            self._pass_on(behind.getresponse(), fault, seconds)

    def _pass_on(self, answer: http.client.HTTPResponse, fault: str, seconds: float) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() != "transfer-encoding":
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None and self.command != "HEAD":
            data = answer.read()  # of unknown length, as listings are
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        self.end_headers()
        if fault in BODY_FAULTS and answer.status == 200:
            self._spoil(answer.read(), fault, seconds)
            return
        while chunk := answer.read(_CHUNK):
            self.wfile.write(chunk)

    def _spoil(self, data: bytes, fault: str, seconds: float) -> None:
        middle = len(data) // 2
        if fault == "flipped_byte":
            self.wfile.write(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        elif fault == "object_replaced":
            self.wfile.write(data[::-1])
        elif fault == "slow_body":
            step = len(data) // _PIECES + 1
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                if start == 0:
                    self.proxy.met(fault, seconds)
                time.sleep(seconds / _PIECES)
            return
        else:
            self.wfile.write(data[:middle])
            self.close_connection = True
        self.proxy.met(fault)
        if fault == "reset_mid_body":
            self._reset()

    def _error(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """End the connection with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


class _Host(BaseManager):
    """The proxy's process."""


_Host.register("FaultProxy", FaultProxy)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy in front of the S3 server at URL `upstream`, for as long as the `with` block lasts."""
    host = _Host(ctx=get_context("spawn"))
    host.start(_end_with_parent)
    with host:
        yield cast(FaultProxy, host.FaultProxy(upstream))  # type: ignore[attr-defined]
