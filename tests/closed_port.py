"""A port that stays closed: nobody listens there, and no other program can."""

from __future__ import annotations

import socket

from infra.local.server_process import free_port


def closed_port() -> socket.socket:
    """Return a socket whose port of 127.0.0.1 refuses connections until it is closed or `listen()` is called.

    A number alone does not keep a port closed: another program of the machine may listen there a moment later.
    """
    held = socket.socket()
    held.bind(("127.0.0.1", free_port()))
    return held


def url_of(held: socket.socket) -> str:
    """Return the address of an HTTP server at the port."""
    return f"http://127.0.0.1:{held.getsockname()[1]}"
