"""The doctor names the node, or the pair of nodes, that differs from the others."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from pipeline.doctor.check import Check
from pipeline.doctor.network import Link, all_reduce, all_reduce_alone, given_up, rounds
from pipeline.doctor.nodes import GPU, NodeFacts, node_facts, odd_clocks, odd_links, odd_nodes

USUAL = NodeFacts([], {"code": "1a", "torch": "2.13.0", GPU: "H200"}, disk_mb_s=900.0, open_files=65536)


def named(found: list[Check]) -> list[tuple[str, str]]:
    return [(check.name, check.status) for check in found]


def other(**same: str) -> dict[str, NodeFacts]:
    """Three equal nodes and a fourth one that differs."""
    odd = replace(USUAL, same=USUAL.same | {key.replace("_", " "): value for key, value in same.items()})
    return {"a": USUAL, "b": USUAL, "c": odd, "d": USUAL}


def test_equal_nodes_have_no_findings() -> None:
    assert odd_nodes({"a": USUAL, "b": USUAL}) == []
    assert odd_nodes({}) == []


def test_a_node_with_other_code_or_versions_fails() -> None:
    (found,) = odd_nodes(other(code="2b"))
    assert (found.name, found.status) == ("c: code", "fail")
    assert "2b on this node, and 1a on 3 of 4 nodes" in found.found
    assert named(odd_nodes(other(torch="2.12.0"))) == [("c: torch", "fail")]
    assert named(odd_nodes(other(kind_of_GPU="A100"))) == [("c: kind of GPU", "warn")]


def test_a_slow_disk_and_a_low_limit_are_named() -> None:
    facts = {"a": USUAL, "b": replace(USUAL, disk_mb_s=100.0), "c": replace(USUAL, open_files=1024)}
    assert named(odd_nodes(facts)) == [("b: disk speed", "warn"), ("c: open files", "warn")]


def test_a_wrong_clock_is_named_unless_the_measurement_is_as_uncertain() -> None:
    assert named(odd_clocks({"a": 0.2, "b": -5.0}, uncertain_s=0.1)) == [("b: clock", "warn")]
    assert odd_clocks({"b": -5.0}, uncertain_s=6.0) == []


def test_a_pair_that_fails_and_a_slow_pair_are_named() -> None:
    links = [Link(("a", "b"), 10.0), Link(("a", "c"), 2.0), Link(("b", "c"), error="no route"), Link(("a", "d"), 9.0)]
    assert named(odd_links(links)) == [("b and c", "fail"), ("a and c", "warn")]
    assert odd_links([]) == []


def test_a_node_that_has_reached_none_of_three_partners_is_not_tried_again() -> None:
    tried = [Link(("a", "c"), error="silent"), Link(("b", "c"), error="silent"), Link(("a", "b"), 9.0)]
    assert given_up(tried) == {}
    found = given_up([*tried, Link(("c", "d"), error="silent")])
    assert list(found) == ["c"]
    assert str(found["c"]) == "c failed with each of a, b, d, and was not tried with other nodes"


def test_a_node_without_its_network_interface_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    all_reduce_alone("127.0.0.1", store.port, on_gpu=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    with pytest.raises(RuntimeError, match="absent0"):
        all_reduce_alone("127.0.0.1", store.port, on_gpu=False)


def test_the_limit_of_a_pair_begins_when_both_ends_are_there() -> None:
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds = [pool.submit(end_of_a_pair, store.port, rank) for rank in range(2)]
        assert all(future.result() > 0 for future in seconds)


def end_of_a_pair(port: int, rank: int) -> float:
    """An end of a pair. The second one starts later than the limit allows for the connection."""
    limit_s = 10.0
    time.sleep(rank * (limit_s + 2))
    return all_reduce("127.0.0.1", port, "pair", rank, on_gpu=False, limit_s=limit_s)


@given(st.integers(0, 17))
def test_every_pair_meets_once_and_a_node_is_in_one_pair_of_a_round(count: int) -> None:
    nodes = [str(number) for number in range(count)]
    found = rounds(nodes)
    assert sorted(tuple(sorted(pair)) for pairs in found for pair in pairs) == sorted(
        tuple(sorted(pair)) for pair in combinations(nodes, 2)
    )
    for pairs in found:
        together = [node for pair in pairs for node in pair]
        assert len(together) == len(set(together))


def test_this_machine_has_facts() -> None:
    facts = node_facts()
    assert facts.same["torch"]
    assert facts.same["code"] == node_facts().same["code"]
    assert facts.disk_mb_s > 0
    assert {check.name for check in facts.checks} >= {"disk", "S3", "MLflow"}
