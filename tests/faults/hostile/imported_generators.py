"""Files with generators of other projects as foreign inputs."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sagan.config import ModelConfig
from sagan.trained_model import Model
from tests.faults.hostile.kind import Kind, Names, command, is_picture, one_of, rewrite
from tests.faults.hostile.random_changes import NUMBERS, TEXTS, changed_tensors, damaged
from tests.unit.importing import peer_files

_SMALL = ModelConfig(resolution=32, num_classes=2, z_dim=8, channels_g=4, attention=(16,))


class _Program:
    """Pickled, it is a program that writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.path), "ran")


def _changed_torch_file(data: bytes, random: Random, names: Names) -> bytes:
    """Return a file of torch.save with other tensors, another pickle, compressed entries, or damaged bytes."""
    match random.choice(("bytes", "pickle", "compressed", "tensors", "tensors", "tensors", "program")):
        case "bytes":
            return damaged(data, random)
        case "program":
            return pickle.dumps(_Program(random.choice(names)))
        case "tensors":
            changed = io.BytesIO()
            torch.save(_changed_state(torch.load(io.BytesIO(data), weights_only=True), random, names), changed)
            return changed.getvalue()
        case kind:
            method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
            copied = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(copied, "w", method) as copy:
                for name in archive.namelist():
                    content = archive.read(name)
                    changes = kind == "pickle" and name.endswith("data.pkl")
                    copy.writestr(name, damaged(content, random) if changes else content)
            return copied.getvalue()


def _changed_state(checkpoint: dict[str, Any], random: Random, names: Names) -> dict[str, Any]:
    state = checkpoint["state_dict"]
    for _ in range(random.randint(1, 3)):
        name = random.choice(sorted(state))
        if isinstance(tensor := state[name], Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
            state[name] = _changed_tensor(tensor, random)
        match random.randrange(6):
            case 0:
                state[random.choice((*TEXTS, *state))] = state.pop(name)
            case 1:
                del state[name]
            case 2:
                state[name] = random.choice((None, {}, [tensor], "text", _Program(random.choice(names))))
    return random.choice((checkpoint, checkpoint, state, {"state_dict": checkpoint}))


def _changed_tensor(tensor: Tensor, random: Random) -> Tensor:
    match random.randrange(8):
        case 0:
            return tensor.to(random.choice((torch.int8, torch.bool, torch.float16, torch.float64, torch.complex64)))
        case 1:
            return tensor[..., : random.randrange(3)] if tensor.dim() else tensor[None]
        case 2:
            return torch.ones(1).expand(random.choice((2**20, 2**40)), *tensor.shape[1:])
        case 3:
            return tensor.to_sparse() if tensor.dim() else tensor
        case 4:
            return torch.empty(tensor.shape, device="meta")
        case 5:
            return tensor.reshape(random.choice(((-1,), (1, *tensor.shape), tensor.shape[::-1])))
    changed = tensor.clone().double().flatten()
    changed[random.randrange(len(changed))] = float(random.choice([n for n in NUMBERS if abs(n) < 10**309 or n != n]))
    return changed.view(tensor.shape)


def _change_torch(folder: Path, random: Random, names: Names) -> None:
    rewrite(one_of(folder, "*.pth", random), _changed_torch_file, random, names)


def _change_safetensors(folder: Path, random: Random, names: Names) -> None:
    rewrite(folder / "G.safetensors", changed_tensors, random, names)


def _is_model(out: Path, printed: str) -> bool:
    """Whether the written folder is a model of finite values with a picture of samples."""
    tensors = Model.load(out / "model").generator.state_dict().values()
    return all(tensor.isfinite().all() for tensor in tensors) and is_picture(out / "model", printed)


def build(root: Path) -> None:
    """Write a clean file of each project below `root`."""
    torch.manual_seed(0)
    folders = root / "generator-of-others", root / "variables-of-others"
    for folder in folders:
        folder.mkdir()
    state = peer_files.studiogan(peer_files.random_generator(_SMALL))
    torch.save({"state_dict": state, "optimizer": {"step": 5}}, folders[0] / "G.pth")
    config = ModelConfig(resolution=128, num_classes=2, z_dim=8, channels_g=1, attention=())
    variables = peer_files.official_tf(peer_files.random_generator(config))
    own = {name: value for name, value in variables.items() if name.startswith("model/g_")}
    save_file(own, folders[1] / "G.safetensors")


_ROW = "generators of other projects"
KINDS = {
    "torch-generator": Kind(
        _ROW,
        5,
        "generator-of-others",
        _change_torch,
        command("import IN/G.pth --from studiogan --weights raw --out OUT/model"),
        _is_model,
    ),
    "safetensors-generator": Kind(
        _ROW,
        3,
        "variables-of-others",
        _change_safetensors,
        command("import IN/G.safetensors --from official-tf --out OUT/model"),
        _is_model,
    ),
}
