"""Clients of storage: the fsspec file system of a URL, with its time-outs and its attempts."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import fsspec
from fsspec.core import strip_protocol

from pipeline.storage.home_folders import expanded

_CONNECT_S = 5  # seconds: limit for opening a connection
SILENCE_S = 20
"""Limit for a server that sends nothing, in seconds."""
ATTEMPTS = 4


def is_local(url: str) -> bool:
    """Return whether a URL is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Return the absolute path of a local URL (see `is_local`). Raises UsageError for the home folder of nobody."""
    return expanded(url.removeprefix("file://")).absolute()


def comparable(url: str) -> PurePath:
    """Return a path by which URLs are compared: whether two are equal, or one is below the other. Follows links."""
    return Path(os.path.realpath(local_path(url))) if is_local(url) else PurePosixPath(url)


def filesystem(url: str, attempts: int = ATTEMPTS) -> tuple[Any, str]:
    """Return this process's fsspec file system for a URL, and the path in it. The file system can be pickled."""
    if is_local(url):
        return _filesystem("file", (), os.getpid(), 1), str(local_path(url))
    protocol, _, _ = url.partition("://")
    # Servers other than AWS answer a range request with the checksum of the whole object. botocore would reject it.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    # A role's credentials come from the machine's metadata server, which may be busy. botocore asks it once, for 1 s.
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "5")
    return _filesystem(protocol, _settings(), os.getpid(), attempts), strip_protocol(url)


def _settings() -> tuple[tuple[str, str], ...]:
    """Return the environment variables that a client reads when it is created.

    A changed value, such as a corrected key or another proxy, needs another client.
    """
    names = ("HOME", *(name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")))
    return tuple((name, os.environ.get(name, "")) for name in sorted(names))


def forget_clients() -> None:
    """Create new clients from now on. A client that has found no credentials does not look for them again."""
    _filesystem.cache_clear()


@lru_cache(maxsize=16)
def _filesystem(protocol: str, settings: tuple[tuple[str, str], ...], pid: int, attempts: int) -> Any:
    """Create a file system. `settings` and `pid` are used only as keys of the cache."""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(sock_connect=_CONNECT_S, sock_read=SILENCE_S)  # no limit for a whole large file
        headers = {"Accept-Encoding": "identity"}  # a compressed object would hide its size
        client = {"timeout": timeout, "headers": headers}
        return fsspec.filesystem(protocol, skip_instance_cache=True, client_kwargs=client)
    if protocol != "s3":
        return fsspec.filesystem(protocol, skip_instance_cache=True)
    config = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": SILENCE_S,
        "retries": {"total_max_attempts": attempts, "mode": "standard"},  # exponential back-off with jitter
    }
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    fs.retries = min(attempts, 2)  # s3fs's retries, beside botocore's, of bodies that break off; default 5
    return fs
