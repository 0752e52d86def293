"""Everything that can end a command, and the exit code it ends with.

    SaganError                    1  the job failed
    ├── UsageError                2  the command line or the job file is wrong
    │   └── ConfigError           2  a job file is: with line, key and the nearest known key
    ├── EnvironmentFault          3  storage, tracker or cluster cannot be reached or refuse us
    │   └── LastingFault          3  … until somebody mends it: waiting alone does not help
    ├── CorruptError              1  bytes differ from what their manifest says
    └── InterruptedRun          130  the user stopped it; the last committed checkpoint stands

A message says what is wrong and where; `remedy` says what to do. Nothing else is shown to the user.
"""

from __future__ import annotations


class SaganError(Exception):
    """What is wrong and where, and what to do about it."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)  # both, so that the error survives pickling between Ray processes
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message


class UsageError(SaganError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class EnvironmentFault(SaganError):
    exit_code = 3


class LastingFault(EnvironmentFault):
    pass


class CorruptError(SaganError):
    pass


class InterruptedRun(SaganError):
    exit_code = 130
