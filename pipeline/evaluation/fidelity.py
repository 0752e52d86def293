"""Importing torch-fidelity beside any build of torch."""

from __future__ import annotations

import sys

import torch


def import_torch_fidelity() -> None:
    """Make `import torch_fidelity` work; afterwards its modules are imported as usual.

    It imports torchvision, whose PyPI build does not load its operators beside a CPU build of torch and then fails on
    registering them. None of them is needed here, so they are declared and the import is made once more.
    """
    try:
        import torch_fidelity
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [module for module in sys.modules if module.split(".")[0] in ("torchvision", "torch_fidelity")]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
        import torch_fidelity  # noqa: F401
