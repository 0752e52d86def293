"""What runs hold of a cluster, in device hours, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

HOUR_S = 3600.0

Amount = Annotated[float, Field(ge=0, le=1e30)]
"""A stored number of hours, of seconds or of units of a currency."""


class Spending(BaseModel):
    """Device hours of a run, or of several runs, and their cost.

    A device hour is an hour of a worker, or of a GPU that scores checkpoints. A cost is in the currency of
    `resources.price_per_device_hour`. A value that nobody has measured or given is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device_hours: float
    """Device hours so far, over all drivers."""
    expected_device_hours: float | None
    """Device hours at the end of training, if the speed stays as it is."""
    cost: float | None
    """Cost of `device_hours`."""
    expected_cost: float | None
    """Cost of `expected_device_hours`."""

    @classmethod
    def of(
        cls, device_hours: float, images_left: float, device_s_per_image: float | None, price: float | None
    ) -> Spending:
        """Return the spending of a run.

        Args:
            device_hours: Device hours so far.
            images_left: Number of images to train on.
            device_s_per_image: Device seconds that an image takes; None where it was not measured.
            price: Price of a device hour; None where none is given.
        """
        expected = None if images_left else device_hours
        if device_s_per_image is not None:
            expected = device_hours + images_left * device_s_per_image / HOUR_S
        return cls(
            device_hours=device_hours,
            expected_device_hours=expected,
            cost=None if price is None else device_hours * price,
            expected_cost=None if price is None or expected is None else expected * price,
        )

    @classmethod
    def total(cls, parts: Iterable[Spending | None]) -> Spending:
        """Return the sum over several runs. None stands for a run that has not started, which may need anything."""
        listed = list(parts)
        started = [part for part in listed if part is not None]
        all_started = len(started) == len(listed)
        return cls(
            device_hours=sum(part.device_hours for part in started),
            expected_device_hours=_sum([part.expected_device_hours for part in started]) if all_started else None,
            cost=_sum([part.cost for part in started]),
            expected_cost=_sum([part.expected_cost for part in started]) if all_started else None,
        )

    @property
    def so_far(self) -> Spending:
        """The same without what is expected."""
        return self.model_copy(update={"expected_device_hours": None, "expected_cost": None})

    def tags(self) -> dict[str, str]:
        """Return the known values as tags for MLflow, by the names of the fields."""
        return {name: shown_amount(value) for name, value in self.model_dump(exclude_none=True).items()}

    def rows(self) -> dict[str, str | None]:
        """Return the values for people, by title; None where there is nothing to show."""
        return {
            "device hours": _of_expected(self.device_hours, self.expected_device_hours),
            "cost": None if self.cost is None else _of_expected(self.cost, self.expected_cost),
        }


def shown_amount(amount: float) -> str:
    """Return a number of hours or of units of a currency for people: two decimals, or two digits below 1."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def _sum(values: Sequence[float | None]) -> float | None:
    """Return the sum; None without values, and where a value is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _of_expected(spent: float, expected: float | None) -> str:
    if expected is None or expected == spent:
        return shown_amount(spent)
    return f"{shown_amount(spent)} of {shown_amount(expected)} expected"
