"""The process group of a run's workers. On one machine, its store is a private file, and its ports are on loopback."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train.torch import TorchConfig, get_device
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)


def worker_device() -> torch.device:
    """Return the GPU that Ray Train gave to this worker, or the CPU where it gave none."""
    device: torch.device = get_device() if ray.get_gpu_ids() else torch.device("cpu")
    return device


class ProcessGroup(TorchConfig):
    """Ray Train's process group, except that workers on one machine meet in a private file.

    Otherwise torch's store is a server. It listens on every interface, and everybody who reaches it can read and
    overwrite its values. Workers on several machines use that server, because torch has no other one.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(set(worker_group.execute(_node))) > 1:
            super().on_start(worker_group, backend_config)
            return
        path = worker_group.execute_single(0, _new_private_file)
        worker_group.execute(_set_torch_distributed_env_vars)
        ranks = range(len(worker_group))
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _join,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(ranks),
                    init_method=f"file://{path}",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in ranks
            ]
        )


def _node() -> str:
    return ray.get_runtime_context().get_node_id()


def _new_private_file() -> str:
    """Return the path of a file that does not exist, in a new folder that only this user may enter.

    The folder is in Ray's session folder, which ends with Ray, because a worker that is killed cannot delete it.
    """
    session = ray._private.worker._global_node.get_session_dir_path()
    return str(Path(tempfile.mkdtemp(prefix="store-", dir=session)) / "store")


def _join(**options: Any) -> None:
    # gloo and NCCL listen for the other workers. Without these variables, they choose an interface of the network.
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    _setup_torch_process_group(**options)
