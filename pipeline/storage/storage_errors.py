"""Errors of storage: what an exception of a file system means, and what the person can do about it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from pipeline.errors import CorruptError, EnvironmentFault, LastingFault

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Return whether an exception says that a disk is full. safetensors raises exceptions that are no OSError."""
    return (isinstance(error, OSError) and error.errno in _FULL) or "(os error 28)" in str(error)


def no_space(folder: Path, what: str) -> EnvironmentFault:
    """Return the EnvironmentFault that says that a folder of this machine has no space for something."""
    is_temporary = folder.is_relative_to(tempfile.gettempdir())
    remedy = "set TMPDIR to a folder with more space" if is_temporary else "choose another folder"
    return EnvironmentFault(f"{folder}: no space left for {what}", f"free some space there, or {remedy}")


def too_large(url: str, most: int) -> CorruptError:
    """Return the CorruptError for an object of more than `most` bytes."""
    return CorruptError(f"{url} is larger than it may be: it has more than {most:,} bytes and was not read further")


def s3_code(error: BaseException) -> str:
    """Return the S3 error code of an exception of s3fs; "" where it has none."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def lacks_credentials(error: BaseException) -> bool:
    """Return whether an exception says that botocore has found no credentials."""
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")


def says_missing(error: FileNotFoundError) -> bool:
    """Return whether the storage itself says that an object does not exist.

    S3 names what is missing: the object or the bucket. Its answer to HEAD is an exception, because it has no body. A
    404 without a name comes from a proxy that has lost the storage for a while.
    """
    code = s3_code(error)
    operation = getattr(error.__cause__, "operation_name", "")
    return code != "NoSuchBucket" and (code != "404" or operation.startswith("Head"))


def fault(url: str, error: Exception) -> EnvironmentFault:
    """Return the EnvironmentFault that describes an exception of a file system, with its remedy."""
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS (no AWS_ENDPOINT_URL)"
    )
    where, code = (f"{url} at {endpoint}" if url.startswith("s3://") else url), s3_code(error)
    if code == "NoSuchBucket":
        bucket = url.removeprefix("s3://").partition("/")[0]
        return LastingFault(
            f"{where}: bucket {bucket!r} does not exist", "create the bucket, or correct the URL or AWS_ENDPOINT_URL"
        )
    if code == "SignatureDoesNotMatch":
        return LastingFault(
            f"{where}: the secret key does not match the key id (SignatureDoesNotMatch)",
            "correct AWS_SECRET_ACCESS_KEY",
        )
    if code == "InvalidAccessKeyId":
        return LastingFault(
            f"{where}: the storage does not know this key id (InvalidAccessKeyId)", "correct AWS_ACCESS_KEY_ID"
        )
    if code.startswith("Expired") or code == "InvalidToken":
        return LastingFault(f"{where}: the credentials have expired ({code})", "get new credentials and start again")
    if code == "RequestTimeTooSkewed":
        return EnvironmentFault(
            f"{where}: the clock of this machine differs from that of the storage by too much (RequestTimeTooSkewed)",
            "synchronise the machine's clock",
        )
    kind = type(error).__name__
    if lacks_credentials(error):
        return LastingFault(
            f"{where}: no credentials found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use a machine that has a role",
        )
    if isinstance(error, PermissionError):
        return LastingFault(
            f"{where}: access denied ({code or error.strerror or error})",
            "allow these credentials or this user to list, read and write there",
        )
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "FSTimeoutError") or isinstance(
        error, ConnectionError | TimeoutError
    ):
        return EnvironmentFault(
            f"{where}: the storage cannot be reached ({kind})",
            "check that the server runs, and check AWS_ENDPOINT_URL and the network",
        )
    if kind in ("ClientPayloadError", "IncompleteRead", "ResponseStreamingError"):
        return EnvironmentFault(f"{where}: the transfer broke off ({kind})", "check the network and the storage's log")
    if code:
        return EnvironmentFault(f"{where}: the storage answers {code}", "check the storage's load and its log")
    if is_full(error):
        return EnvironmentFault(f"{where}: no space left", "free some space, or choose another place")
    return EnvironmentFault(f"{where}: {kind}: {error}", "run `sagan doctor`, which checks storage step by step")
