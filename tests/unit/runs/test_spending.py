"""Device hours and costs of runs, and what is known of them."""

from __future__ import annotations

from pipeline.runs.spending import Spending, shown_amount


def test_a_run_is_expected_to_need_what_its_images_left_take() -> None:
    spending = Spending.of(2.0, 7200, 1.5, 0.5)
    assert (spending.device_hours, spending.expected_device_hours) == (2.0, 5.0)
    assert (spending.cost, spending.expected_cost) == (1.0, 2.5)
    assert spending.rows() == {"device hours": "2.00 of 5.00 expected", "cost": "1.00 of 2.50 expected"}
    assert spending.tags() == {
        "device_hours": "2.00",
        "expected_device_hours": "5.00",
        "cost": "1.00",
        "expected_cost": "2.50",
    }


def test_nothing_is_expected_without_a_speed_and_nothing_costs_without_a_price() -> None:
    spending = Spending.of(2.0, 7200, None, None)
    assert (spending.expected_device_hours, spending.cost, spending.expected_cost) == (None, None, None)
    assert spending.rows() == {"device hours": "2.00", "cost": None}
    assert spending.tags() == {"device_hours": "2.00"}
    ended = Spending.of(2.0, 0, None, 3.0)
    assert (ended.expected_device_hours, ended.expected_cost) == (2.0, 6.0)
    assert ended.rows() == {"device hours": "2.00", "cost": "6.00"}, "there is no more to come"


def test_a_sum_is_known_where_all_of_its_parts_are() -> None:
    known = [Spending.of(1.0, 3600, 2.0, 10.0), Spending.of(2.0, 0, 2.0, 10.0)]
    total = Spending.total(known)
    assert (total.device_hours, total.expected_device_hours) == (3.0, 5.0)
    assert (total.cost, total.expected_cost) == (30.0, 50.0)
    assert (total.so_far.cost, total.so_far.expected_cost, total.so_far.expected_device_hours) == (30.0, None, None)

    with_a_new_run = Spending.total([*known, None])
    assert with_a_new_run == total.so_far
    without_a_price = Spending.total([*known, Spending.of(4.0, 0, None, None)])
    assert (without_a_price.expected_device_hours, without_a_price.cost) == (9.0, None)
    assert Spending.total([]).cost is None


def test_small_amounts_are_not_shown_as_nothing() -> None:
    assert [shown_amount(amount) for amount in (0.0, 0.00123, 0.5, 12345.678)] == ["0", "0.0012", "0.5", "12,345.68"]
