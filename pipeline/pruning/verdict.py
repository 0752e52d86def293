"""What a prune decides about one thing that is stored."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["version", "files", "checkpoint", "statistics", "run"]


class Verdict(BaseModel):
    """Whether a thing is deleted or kept, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    """`files` are the files of a version that is deleted already. All checkpoints of a `run` are kept."""
    name: str
    """Registry URI of a version, id of the logged model that has the files, or URL."""
    goes: bool
    reason: str
    size: int = 0
    """Bytes of a thing that is deleted; 0 for a thing that is kept."""

    @property
    def line(self) -> str:
        """The verdict as one line for people."""
        size = f" ({self.size / 1e6:,.1f} MB)" if self.goes else ""
        return f"{self.kind} {self.name}{size}: {self.reason}"


def kept(kind: Kind, name: str, reason: str) -> Verdict:
    return Verdict(kind=kind, name=name, goes=False, reason=reason)


def goes(kind: Kind, name: str, reason: str, size: int) -> Verdict:
    return Verdict(kind=kind, name=name, goes=True, reason=reason, size=size)
