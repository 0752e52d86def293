"""How many processes fit is counted node by node, since no process spans two nodes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.compute import resources
from pipeline.compute.resources import count_fitting, fits, wait_for_nodes


def node(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus}


@pytest.mark.parametrize(
    ("free", "each", "reserved", "fit"),
    [
        ([], node(1), [], 0),
        ([node(1), node(1)], node(1), [], 2),
        ([node(1.5), node(1.5)], node(1), [], 2),  # the halves are of two nodes
        ([node(0.3)], node(0.1), [], 3),  # 0.3 / 0.1 is 2.9999…
        ([node(64, 8), node(64, 1)], node(8, 1), [], 9),
        ([node(4, 8)], node(8, 1), [], 0),
        ([node(2), node(1)], node(1), [node(1)], 2),
        ([node(64, 8)], node(8, 1), [node(1, 1)] * 2, 6),
        ([node(1)], node(1), [node(2)], 1),  # what fits nowhere keeps no room
        ([node(1), node(3)], node(1), [node(2, 0)], 2),
        ([node(8, 2)], {"CPU": 1.0, "GPU": 0.0}, [], 8),
    ],
)
def test_processes_fit(
    free: list[dict[str, float]], each: dict[str, float], reserved: list[dict[str, float]], fit: int
) -> None:
    assert count_fitting(free, each, reserved) == fit


@pytest.mark.parametrize(
    ("nodes", "count", "each", "beside", "fit"),
    [
        ([node(1), node(1)], 2, node(1), [], True),
        ([node(3), node(5)], 2, node(4), [], False),  # 8 CPUs, but each process is on one node
        ([node(2), node(1)], 2, node(1), [node(1)], True),
        ([node(2), node(1)], 3, node(1), [node(1)], False),
        ([node(1)], 1, node(1), [node(2)], False),  # unlike `count_fitting`, which then keeps no room
        ([node(8, 8)], 4, node(1, 1), [node(0, 1)] * 4, True),
    ],
)
def test_processes_fit_together(
    nodes: list[dict[str, float]],
    count: int,
    each: dict[str, float],
    beside: list[dict[str, float]],
    fit: bool,
) -> None:
    assert fits(nodes, count, each, beside) == fit


def test_a_wait_for_nodes_outlives_a_silent_head_and_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor of Ray Train replaces the request for nodes by an empty one. Without it, no autoscaler adds nodes."""
    looks, requested = 0, list[list[dict[str, float]]]()

    def request(bundles: list[dict[str, float]]) -> None:
        requested.append(bundles)

    def status() -> SimpleNamespace:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise ConnectionError("the head does not answer")
        if looks == 4:
            requested.append([])
        rows = [SimpleNamespace(request=SimpleNamespace(resources_bundle=bundle), count=1) for bundle in requested[-1]]
        asked = SimpleNamespace(
            cluster_resource_state_version=looks,
            cluster_resource_constraints=[SimpleNamespace(resource_requests=rows)],
        )
        state = SimpleNamespace(
            last_seen_cluster_resource_state_version=looks + 1, infeasible_cluster_resource_constraints=looks == 8
        )
        return SimpleNamespace(autoscaling_state=state, cluster_resource_state=asked)

    monkeypatch.setattr(resources, "_has_autoscaler", lambda: True)
    monkeypatch.setattr(resources, "_request_nodes", request)
    monkeypatch.setattr(resources, "_cluster_status", status)
    monkeypatch.setattr(resources, "_LOOK_S", 0.0)
    needed = {"CPU": 1.0}
    wait_for_nodes([needed], lambda: False, "a worker")
    assert looks == 8, "the wait ends where the autoscaler says that it has no such nodes"
    assert requested == [[needed], [], [needed], []]
