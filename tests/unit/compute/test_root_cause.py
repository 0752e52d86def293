"""Errors of Ray say what happened, without its wrappers and tracebacks."""

from __future__ import annotations

from pipeline.compute.root_cause import connection_error

# The text of Ray 2.60 for an address that accepts connections but is no head.
NO_HEAD = """Failed to connect to GCS. Last connection error: Traceback (most recent call last):
  File "ray/_private/node.py", line 996, in _init_gcs_client
    client = GcsClient(
ray.exceptions.RpcError: Timed out while waiting for GCS to become available.
"""


def wrapped(cause: str) -> ConnectionError:
    error = ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379")
    error.__cause__ = RuntimeError(cause)
    return error


def test_a_failed_connection_names_its_cause_without_a_traceback() -> None:
    assert connection_error(wrapped(NO_HEAD)) == (
        "Failed to connect to GCS. Last connection error: "
        "ray.exceptions.RpcError: Timed out while waiting for GCS to become available."
    )
    assert connection_error(wrapped("No node info found\nmatching attributes")) == (
        "No node info found\nmatching attributes"
    )
    assert connection_error(OSError(111, "Connection refused")) == "[Errno 111] Connection refused"
