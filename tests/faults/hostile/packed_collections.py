"""Packed collections as foreign inputs: manifest, index, keys, shards and the images in them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from pipeline.collection.manifest import Collection
from pipeline.config.schema import PackSection
from pipeline.packing.pack import pack
from pipeline.storage.file_sets import Manifest
from tests.faults.hostile.kind import Kind, Names, change_json_file, command, one_of, rewrite, write_photos
from tests.faults.hostile.random_changes import changed_image, changed_json, changed_tar, changed_tensors, damaged
from tests.hostile_collection import change_manifest, write_index


def _change_manifest(folder: Path, random: Random, names: Names) -> None:
    rewrite(folder / "manifest.json", changed_json, random, names)


def _change_index(folder: Path, random: Random, names: Names) -> None:
    write_index(folder, changed_tensors((folder / "index.safetensors").read_bytes(), random, names))


def _change_keys(folder: Path, random: Random, names: Names) -> None:
    path = folder / "keys.txt"
    lines = path.read_text().split("\n")
    lines[random.randrange(len(lines))] = random.choice([*names, "\x1b[2J", "", "a" * 10**5])
    path.write_text("\n".join(lines)) if random.random() < 0.5 else rewrite(path, damaged, random)
    _enter(folder, "keys", path)


def _change_shard(folder: Path, random: Random, names: Names) -> None:
    path = one_of(folder, "*.tar", random)
    rewrite(path, changed_tar, random, names)
    _enter_shard(folder, path, random)


def _change_stored_image(folder: Path, random: Random, names: Names) -> None:
    """Damage the bytes of one image in place, so that index and tar still fit."""
    path = one_of(folder, "*.tar", random)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = random.choice([m for m in tar.getmembers() if not m.name.endswith(".cls")])
    place = slice(member.offset_data, member.offset_data + member.size)
    data[place] = changed_image(bytes(data[place]), random)[: member.size].ljust(member.size, b"\0")
    path.write_bytes(data)
    _enter_shard(folder, path, None)


def _change_manifest_index_or_shard(folder: Path, random: Random, names: Names) -> None:
    random.choice((_change_manifest, _change_index, _change_shard))(folder, random, names)


def _enter_shard(folder: Path, path: Path, random: Random | None) -> None:
    """Correct the entry of a shard in the manifest, mostly."""
    if random is not None and random.random() < 0.2:
        return
    entry = Manifest.of(folder).files[path.name]

    def correct(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            if shard["name"] == path.name:
                shard.update(size=entry.size, sha256=entry.sha256)

    change_manifest(folder, correct)


def _enter(folder: Path, key: str, path: Path) -> None:
    entry = Manifest.of(folder).files[path.name]
    change_manifest(folder, lambda manifest: manifest.update({key: {"size": entry.size, "sha256": entry.sha256}}))


def _is_good(out: Path, printed: str) -> bool:
    return "all are good" in printed


def is_packed(out: Path, printed: str) -> bool:
    """Whether `sagan verify` accepted what was packed, and every label is one of a class."""
    if not (out / "collection").exists():
        return "all are good" in printed  # shards that were indexed in place
    collection = Collection.open(str(out / "collection"))
    classes = max(1, len(collection.class_names))
    return "all are good" in printed and bool(((collection.labels >= 0) & (collection.labels < classes)).all())


def build(root: Path) -> None:
    """Write the clean collections below `root`, one for each encoding, and the images that are packed in them."""
    write_photos(root / "photos" / "train", 8)
    write_photos(root / "photos" / "heldout", 3)
    for encoding in ("png", "jpeg", "webp"):
        source = {split: str(root / "photos" / split) for split in ("train", "heldout")}
        section = PackSection(source=source, resolution=32, encoding=encoding, shard_images=4)
        pack(str(root / f"collection-{encoding}"), section, lambda done, total: None)


def pack_and_verify(source: str = "IN", *options: str) -> Callable[[Path, Path], None]:
    """Return a function that packs a source, and verifies what it packed."""
    line = " ".join(["pack", source, "OUT/collection --resolution 32", *options])
    return command(line, "verify OUT/collection")


def _verified(share: int, change: Callable[[Path, Random, Names], object]) -> Kind:
    return Kind("manifest, index, keys, shard", share, "collection-png", change, _VERIFY, _is_good)


_VERIFY = command("verify IN")
_AGAIN = "pack train=CLEAN/photos/train heldout=CLEAN/photos/heldout IN --resolution 32 --encoding png --shard-images 4"
_IN_SHARDS, _AS_SOURCES = "images in shards (3 encodings)", "packed collections as sources, pack.json"
KINDS = {
    "manifest": _verified(10, _change_manifest),
    "index": _verified(10, _change_index),
    "keys": _verified(3, _change_keys),
    "shard": _verified(10, _change_shard),
    **{
        f"stored {name}": Kind(_IN_SHARDS, 4, f"collection-{name}", _change_stored_image, _VERIFY, _is_good)
        for name in ("png", "jpeg", "webp")
    },
    "collection, repacked": Kind(
        _AS_SOURCES, 4, "collection-png", _change_manifest_index_or_shard, pack_and_verify(), is_packed
    ),
    "pack.json": Kind(
        _AS_SOURCES, 1, "collection-png", change_json_file("pack.json"), command(_AGAIN, "verify IN"), is_packed
    ),
}
