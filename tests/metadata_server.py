"""A metadata server as AWS, Azure or Google Cloud has one for each machine, on loopback."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, str]  # status and body


class MetadataServer:
    """The metadata server of one machine, which runs while a `with` block does.

    Args:
        cloud: aws, azure or gcp.

    Attributes:
        asked: Set when the machine has asked, and there was no notice.
        broken: The server answers every request with this status and body while it is not None.
        tokens: Tokens that AWS has given and that have not expired.
        events: Azure's events.
    """

    name = "machine-3"

    def __init__(self, cloud: str) -> None:
        self.cloud = cloud
        self.asked = threading.Event()
        self.broken: Answer | None = None
        self.tokens: list[str] = []
        self.events: list[dict[str, object]] = []
        self._taken = False
        self._changed = threading.Condition()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = server.broken or getattr(server, server.cloud)(self)
                self.send_response(status)
                self.send_header("ETag", server._etag)
                self.end_headers()
                self.wfile.write(body.encode())

            do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True

    @property
    def env(self) -> dict[str, str]:
        return {"SAGAN_METADATA_URL": f"http://127.0.0.1:{self._http.server_port}"}

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def _etag(self) -> str:
        return "5f1c" if self._taken else "08d3"

    def give_notice(self) -> None:
        """Take the machine away."""
        with self._changed:
            self._taken = True
            self.events += [self.event("Preempt", self.name)]
            self._changed.notify_all()

    @staticmethod
    def event(kind: str, *machines: str) -> dict[str, object]:
        """An event of Azure."""
        return {
            "EventId": "f020ba2e-3bc0-4c40-a10b-86575a9eabd5",
            "EventStatus": "Scheduled",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": list(machines),
            "NotBefore": "Mon, 19 Sep 2026 18:29:47 GMT",
        }

    def aws(self, request: BaseHTTPRequestHandler) -> Answer:
        if request.command == "PUT":
            if request.path != "/latest/api/token":
                return 404, ""
            if not 1 <= int(request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600:
                return 400, ""
            self.tokens.append(f"token-{len(self.tokens)}==")
            return 200, self.tokens[-1]
        if request.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return 401, ""
        if request.path == "/latest/meta-data/spot/instance-action" and self._taken:
            return 200, json.dumps({"action": "terminate", "time": "2026-09-18T08:22:00Z"})
        self.asked.set()
        return 404, ""

    def azure(self, request: BaseHTTPRequestHandler) -> Answer:
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        if request.headers.get("Metadata") != "true" or "api-version" not in query:
            return 400, json.dumps({"error": "Bad request"})
        if url.path == "/metadata/instance/compute/name" and query["format"] == ["text"]:
            return 200, self.name
        if url.path != "/metadata/scheduledevents":
            return 404, ""
        if not self._taken:
            self.asked.set()
        return 200, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})

    def gcp(self, request: BaseHTTPRequestHandler) -> Answer:
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        if request.headers.get("Metadata-Flavor") != "Google":
            return 403, ""
        if url.path != "/computeMetadata/v1/instance/preempted":
            return 404, ""
        with self._changed:
            if not self._taken:
                self.asked.set()
            if query.get("wait_for_change") == ["true"]:
                seen, longest = query["last_etag"][0], int(query["timeout_sec"][0])
                self._changed.wait_for(lambda: self._etag != seen, longest)
            return 200, "TRUE" if self._taken else "FALSE"
