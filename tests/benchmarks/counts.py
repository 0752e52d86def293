"""What a training step asks of a GPU, counted without one: `python -m tests.benchmarks.counts [--json FILE]`.

The official SAGAN at 128 px with attention at 64×64, in bf16, batch 256. The step runs at full size on a simulated GPU
that computes nothing (`tests/simulated_gpu/`), in the forms that CUDA has (`_kernel_stand_ins.py`). The model of the
cost is simple, and it is the same for every change of the code:

launches_eager: Kernels, copies and fills that the operators start. Views start none. An operator starts one, except
    those of `_STARTS` (from torch's CUDA sources) and those on lists of tensors, whose chunks are counted as
    `MultiTensorApply.cuh` cuts them. Kernels that cuDNN adds for layouts are not counted.
gigabytes: Bytes of all tensors that operators read and write, each once per operator (10⁹). An expanded tensor counts
    with its memory. Lookups count the rows that they read. Caches of the device are not modelled.
live_gib: Largest sum of the sizes of all tensors at one time, state and batch included (2³⁰ bytes). Workspaces and
    fragmentation come on top.
collectives_32_per_rank: Collectives of a step on 8 ranks with 32 images each. `collectives_gradients` of them are
    DDP's buckets.
host_syncs: Operators for which the host waits.

Kernels of compiled networks are not counted, because Inductor makes them for a GPU only where there is one.

The table shows where in `sagan` the operators come from. Operators of a backward pass belong to the line of the forward
pass that recorded them.
"""

from __future__ import annotations

# isort: off
from tests.simulated_gpu.simulated_gpu import NAME, Record, tensors_of  # before sagan
# isort: on

import argparse
import json
import re
import sys
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from sagan import ModelConfig, OptimConfig, Step, TrainState
from sagan.ranks import World
from tests.benchmarks import _kernel_stand_ins

MODEL = ModelConfig(resolution=128, num_classes=1000, attention=(64,), spectral_norm_start="cold")
BATCH = 256
RANKS, SHARE = 8, 32

_NO_LAUNCH = ("squeeze_", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_STARTS = {
    # copies of the gradient and of the index, and a sort by keys, which starts about five kernels
    "index_put": 8,
    "_index_put_impl_": 8,
    "embedding_dense_backward": 2,  # fill, add
    "max_pool2d_with_indices_backward": 2,  # fill, add
    "dot": 2,  # both steps of a reduction
} | _kernel_stand_ins.LAUNCHES
_LOOKUPS = ("index", "embedding", "index_select", "gather")
_SCATTERS = ("index_put", "index_put_", "_index_put_impl_", "embedding_dense_backward")
_WRITE_ALONE = ("copy_", "zero_", "fill_")
_TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # by the number of lists, MultiTensorApply.cuh
_BLOCKS_OF_A_LAUNCH, _CHUNK = 320, 65536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    arguments = parser.parse_args()
    counted = count_step(BATCH)
    collectives = count_collectives()
    Console(width=120).print(counted.table())
    figures = counted.figures() | {
        "collectives_32_per_rank": collectives.total(),
        "collectives_gradients": collectives["gradients"],
    }
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


@dataclass
class Row:
    """Counts of one place in the code."""

    launches: int = 0
    bytes: int = 0
    operators: Counter[str] = field(default_factory=Counter)


class Counts:
    """Counts the operators of the device. An instance is `Record`'s `observe`."""

    def __init__(self) -> None:
        self.syncs = 0
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._live = 0
        self.clear()

    def clear(self) -> None:
        """Start to count a step. Tensors that exist stay counted as live."""
        self.rows: defaultdict[tuple[str, str], Row] = defaultdict(Row)
        self.most_live = self._live

    def __call__(self, func: Any, given: Any, out: Any) -> None:
        for tensor in tensors_of(out):
            self._note_storage(tensor.untyped_storage())
        launches, moved = cost(func, given, out)
        if launches:
            row = self.rows[_place()]
            row.launches += launches
            row.bytes += moved
            row.operators[_name(func)] += launches

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return

        def forget(_: object) -> None:
            self._live -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, forget), size)
        self._live += size
        self.most_live = max(self.most_live, self._live)

    def figures(self) -> dict[str, float]:
        rows = self.rows.values()
        return {
            "launches_eager": sum(row.launches for row in rows),
            "gigabytes": round(sum(row.bytes for row in rows) / 1e9, 1),
            "live_gib": round(self.most_live / 2**30, 2),
            "host_syncs": self.syncs,
        }

    def table(self) -> Table:
        table = Table(title=f"one step, batch {BATCH}, attention 64×64, bf16")
        for column in ("place", "pass", "launches", "GB", "operators"):
            table.add_column(column, justify="right" if column in ("launches", "GB") else "left", no_wrap=True)
        for (place, direction), row in sorted(self.rows.items(), key=lambda item: -item[1].bytes):
            operators = ", ".join(f"{name} {n}" for name, n in row.operators.most_common(6))
            table.add_row(place, direction, str(row.launches), f"{row.bytes / 1e9:.1f}", operators)
        return table


def count_step(batch: int) -> Counts:
    """Return the counts of a step after the first, at full size."""
    counts = Counts()
    anomalies = torch.autograd.set_detect_anomaly(True, check_nan=False)
    with Record("meta", counts) as record, _kernel_stand_ins.cuda_forms(), anomalies:
        step, batches = _step(batch, World())
        step(batches)
        counts.clear()
        record.clear()
        step(batches)
        counts.syncs = record.syncs.total()
    return counts


def count_collectives() -> Counter[str]:
    """Return the number of collectives of a step by kind. DDP's buckets are `gradients`."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    counted: Counter[str] = Counter()

    def reduce(_, bucket):  # without annotations, because DDP compares them as objects
        counted["gradients"] += 1
        reduced = torch.futures.Future()
        reduced.set_result(bucket.buffer())
        return reduced

    class Counting(DistributedDataParallel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.register_comm_hook(None, reduce)

    verify = "torch.nn.parallel.distributed._verify_param_shape_across_processes"  # reads numbers
    counting = mock.patch("sagan.step.DistributedDataParallel", Counting)
    try:
        with Record("meta") as record, _kernel_stand_ins.cuda_forms(), mock.patch(verify), counting:
            step, batches = _step(SHARE, World.current())
            for _ in range(2):
                counted.clear()
                record.clear()
                step(batches)
            return counted + record.collectives
    finally:
        dist.destroy_process_group()


def _step(share: int, world: World) -> tuple[Step, list[tuple[Tensor, Tensor]]]:
    """Return the step, and the batches of this rank."""
    with torch.device("meta"):  # no time for initial weights
        state = TrainState(MODEL, OptimConfig(), 0, NAME)
    images = torch.empty(share, 3, 128, 128, device=NAME)
    labels = torch.empty(share, dtype=torch.int64, device=NAME)
    return Step(state, share * world.size, world, precision="bf16"), [(images, labels)]


def cost(func: Any, given: Any, out: Any) -> tuple[int, int]:
    """Return the number of launches of an operator, and the bytes that it moves."""
    name, results, inputs = _name(func), tensors_of(out), tensors_of(given)
    arguments = func._schema.arguments
    by_name = {a.name: value for a, value in zip(arguments, given[0], strict=False)} | given[1]
    changed = tensors_of([by_name[a.name] for a in arguments if _is_written(a) and a.name in by_name])
    known = {t.untyped_storage()._cdata for t in inputs}
    made = [t for t in results if t.untyped_storage()._cdata not in known]
    if name in _NO_LAUNCH or not (made or changed) or not any(t.numel() for t in (*made, *changed)):
        return 0, 0
    if name.startswith(("_foreach", "_fused")):
        lists = [x for x in given[0] if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor) and x[0].dim()]
        launches = _launches_of_lists(lists or [given[0][0]]) + 2 * (name == "_foreach_norm")  # fill and combine
    elif name == "convolution":
        launches = 1 + (given[0][2] is not None)  # the bias is added apart
    elif name == "convolution_backward":
        launches = len(made)
    elif name in ("cat", "stack"):
        launches = -(-len(given[0][0]) // 128)
    else:
        launches = _STARTS.get(name, 1)
    return launches, _bytes_moved(name, given, inputs, made, changed)


def _launches_of_lists(lists: list[Any]) -> int:
    """Return the launches of a kernel over lists of tensors of equal shapes."""
    most = _TENSORS_OF_A_LAUNCH[len(lists)]
    launches, tensors, blocks = 0, 0, 0
    for number, tensor in enumerate(lists[0], 1):
        tensors += 1
        chunks = -(-tensor.numel() // _CHUNK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            is_end = chunk == chunks and (tensors == most or number == len(lists[0]))
            if is_end or blocks == _BLOCKS_OF_A_LAUNCH:
                launches += 1
                tensors, blocks = (0 if chunk == chunks else 1), 0
    return launches


def _bytes_moved(name: str, given: Any, inputs: list[Tensor], made: list[Tensor], changed: list[Tensor]) -> int:
    if name == "convolution_backward":  # each of the gradients is a kernel of its own
        dy, x, weight = (_size(t) for t in given[0][:3])
        read = sum(size for size, wanted in zip((dy + weight, dy + x, dy), given[0][-1], strict=True) if wanted)
    elif name in _LOOKUPS:
        read = sum(map(_size, made)) + sum(_size(t) for t in inputs if not t.is_floating_point())
    elif name in _SCATTERS:  # the rows of the values are read, and added to the rows of the table
        values = _size(given[0][0] if name == "embedding_dense_backward" else given[0][2])
        return 3 * values + (_size(made[0]) if name == "embedding_dense_backward" else 0)
    else:
        unread = {id(t) for t in changed} if name in _WRITE_ALONE else set()
        read = sum(_size(t) for t in {id(t): t for t in inputs}.values() if id(t) not in unread)
    return read + sum(map(_size, made)) + sum(map(_size, changed))


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor without repetitions of an expanded one."""
    sides = (side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or side == 0)
    return torch.Size(sides).numel() * tensor.element_size()


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _name(func: Any) -> str:
    name: str = func._schema.name.split("::")[1]
    return name


def _place() -> tuple[str, str]:
    """Return the file and function of `sagan` that an operator comes from, and whether it runs forward or backward."""
    node = torch._C._current_autograd_node()
    frame, direction = sys._getframe(), "forward" if node is None else "backward"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "sagan" and frame.f_code.co_name != "_backward":
            return f"{path.stem}.{frame.f_code.co_name}", direction
        frame = frame.f_back  # type: ignore[assignment]
    recorded = "" if node is None else "".join(node.metadata.get("traceback_", []))
    places = re.findall(r'/sagan/(\w+)\.py", line \d+, in (\w+)', recorded)
    return (".".join(places[-1]) if places else "autograd"), direction


if __name__ == "__main__":
    main()
