"""The errors that end a command, and their exit codes.

    SaganError                    1  the job failed
    ├── UsageError                2  the command line or the job file is wrong
    │   └── ConfigError           2  a job file is wrong; the message names the line, the key and the nearest known key
    ├── EnvironmentFault          3  storage, tracker or cluster cannot be reached, or refuses a request
    │   ├── LastingFault          3  the same, until a person corrects the cause; waiting does not help
    │   └── ProcessDied           3  a process of the cluster died before it had a result
    ├── Diverged                  1  training gives values that are not finite, and repeating it does not help
    ├── CorruptError              1  stored bytes differ from their manifest, or a record is not valid
    ├── BudgetSpent               4  the run has reached its budget; its last complete checkpoint is kept
    └── InterruptedRun          130  the user stopped the run; its last complete checkpoint is kept

The message says what is wrong and where. The remedy says what to do. The user sees nothing else.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/]*@)?(?P<rest>[^\s?#'\"<>]*)(?P<query>[?#][^\s'\"<>]*)?"
)
_BUCKETS = ("s3://", "gs://")


def shown_url(text: str) -> str:
    """Return a URL, or a text with URLs, without user, password and query of each URL. These may be secrets.

    The key of an object in a bucket may contain `?` and `#`, so s3:// and gs:// URLs have no query.
    """
    return _URL.sub(
        lambda url: url["scheme"] + url["rest"] + (url["query"] or "" if url["scheme"] in _BUCKETS else ""), text
    )


def without_secrets_of(url: str, text: str) -> str:
    """Return a text, such as the message of a library about a URL, without the URL's password and query."""
    parts = urlsplit(url)
    for secret in filter(None, (parts.query, parts.password)):
        text = text.replace(secret, "…")
    return text


def printable(text: str) -> str:
    """Return a text in which unprintable letters are escaped, except tab and newline.

    Text of other people could otherwise move the cursor, hide lines or change the terminal.
    """
    return "".join(c if c.isprintable() or c in "\t\n" else ascii(c)[1:-1] for c in text)


def counted(number: float, noun: str) -> str:
    """Return a number with its noun for messages, in the plural where the number is not 1."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


class SaganError(Exception):
    """An error with a message and a remedy. Both are shown without secrets of URLs and without control characters.

    Attributes:
        message: What is wrong, and where.
        remedy: What to do; "" where there is nothing to add.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        message, remedy = printable(shown_url(message)), printable(shown_url(remedy))
        super().__init__(message, remedy)  # pickle restores an exception from these arguments between Ray processes
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


class ProcessDied(EnvironmentFault):
    pass


class Diverged(SaganError):
    pass


class CorruptError(SaganError):
    pass


class BudgetSpent(SaganError):
    exit_code = 4


class InterruptedRun(SaganError):
    exit_code = 130
