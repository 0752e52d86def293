"""Causes of Ray's exceptions."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ProcessDied


def result(reference: Any) -> Any:
    """Return the result of a task.

    Raises the exception of the task's function, without Ray's wrapper, and ProcessDied where its process has died.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ProcessDied(
            f"a process of the cluster died: {_without_traceback(str(error))}",
            "look for the cause, for example memory; then run the same command again to resume",
        ) from error


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, without the exceptions that Ray wrapped around it."""
    import ray.exceptions
    import ray.train

    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        return root_cause(error.worker_failures[min(error.worker_failures)])
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return root_cause(error.cause)
    if isinstance(error, ray.train.ControllerError):
        return root_cause(error.controller_failure)
    original = getattr(error, "_base_exc", None)
    return root_cause(original) if isinstance(original, BaseException) else error


def connection_error(error: BaseException) -> str:
    """Return why Ray could not be joined, without the traceback that Ray puts into the text of the cause."""
    return _without_traceback(str(error.__cause__ or error))


def _without_traceback(text: str) -> str:
    """Return a text in which its last line stands for a traceback."""
    text = text.strip()
    before, found, traceback = text.partition("Traceback (most recent call last)")
    return before + traceback.splitlines()[-1] if found else text
