"""Causes of Ray's exceptions."""

from __future__ import annotations

from typing import Any


def result(reference: Any) -> Any:
    """Return the result of a task. Raises the exception of the task's function, without Ray's wrapper."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, without the exceptions that Ray wrapped around it."""
    import ray.exceptions
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        return root_cause(error.worker_failures[min(error.worker_failures)])
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return root_cause(error.cause)
    original = getattr(error, "_base_exc", None)
    return root_cause(original) if isinstance(original, BaseException) else error


def connection_error(error: BaseException) -> str:
    """Return why Ray could not be joined, without the traceback that Ray puts into the text of the cause."""
    text = str(error.__cause__ or error).strip()
    before, found, traceback = text.partition("Traceback (most recent call last)")
    return before + traceback.splitlines()[-1] if found else text
