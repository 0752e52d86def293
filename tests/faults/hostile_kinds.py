"""The kinds of foreign input of `tests.faults.hostile`: a clean example of each, its changes, and what reads it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from pipeline import cli
from pipeline.collection.derived_tensors import NoFacts, derived
from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection, PackSection
from pipeline.evaluation.extractors.classifier import Classifier
from pipeline.packing.pack import pack
from pipeline.runs.checkpoints import StoredCheckpoint, upload_checkpoint, write_checkpoint
from pipeline.runs.json_records import (
    CheckpointFacts,
    RecordedData,
    RecordedEvaluation,
    RunRecord,
    ScoreRecord,
    SweepRecord,
    SweepSummary,
    SweepTrials,
    TrainSummary,
    Trial,
)
from pipeline.runs.score_protocol import Score, ScoreProtocol
from pipeline.runs.stored_run import StoredRun, StoredSweep
from pipeline.storage.file_sets import MANIFEST, Manifest, read_manifest
from pipeline.tracking import registry
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model
from tests.faults.hostile_changes import (
    changed_image,
    changed_json,
    changed_tar,
    changed_tensors,
    changed_value,
    damaged,
    hostile_value,
)
from tests.hostile_collection import change_manifest, write_index

NETWORKS = ModelConfig(resolution=32, num_classes=2, z_dim=8, channels_g=2, channels_d=8)
FORMATS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpg": {},
    "webp": {"lossless": True},
    "bmp": {},
    "gif": {},
    "tiff": {"compression": "tiff_lzw"},
    "ppm": {},
    "jp2": {},
    "avif": {},
}
CODE = "import pathlib\npathlib.Path({path!r}).write_text('ran')\n"

Names = list[str]


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        share: Share of all inputs, relative to the other kinds.
        folder: Name of the folder with the clean input.
        change: Changes the copy of the clean input in a folder. Names lead to files of somebody else.
        read: Gives the input in the first folder to a public command, which writes to the second folder.
        is_right: Whether the files in the second folder, and what the command printed, are a right result.
    """

    share: int
    folder: str
    change: Callable[[Path, Random, Names], object]
    read: Callable[[Path, Path], object]
    is_right: Callable[[Path, str], bool]


def command(*commands: str) -> Callable[[Path, Path], None]:
    """Return a function that runs `sagan` with each line of arguments.

    IN and OUT are the folders, and CLEAN is the folder with all clean inputs.
    """

    def read(source: Path, out: Path) -> None:
        places = {"IN": str(source), "OUT": str(out), "CLEAN": str(source.parents[2] / "clean")}
        for line in commands:
            words = (re.sub("IN|OUT|CLEAN", lambda place: places[place[0]], word) for word in line.split())
            sys.argv = ["sagan", *words]
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    raise

    return read


# --- changes ---------------------------------------------------------------------------------------------------------


def _rewrite(path: Path, change: Callable[..., bytes], random: Random, *names: Names) -> None:
    path.write_bytes(change(path.read_bytes(), random, *names))


def _one_of(folder: Path, pattern: str, random: Random) -> Path:
    return random.choice(sorted(folder.glob(pattern)))


def _change_manifest(folder: Path, random: Random, names: Names) -> None:
    _rewrite(folder / "manifest.json", changed_json, random, names)


def _change_index(folder: Path, random: Random, names: Names) -> None:
    write_index(folder, changed_tensors((folder / "index.safetensors").read_bytes(), random, names))


def _change_keys(folder: Path, random: Random, names: Names) -> None:
    path = folder / "keys.txt"
    lines = path.read_text().split("\n")
    lines[random.randrange(len(lines))] = random.choice([*names, "\x1b[2J", "", "a" * 10**5])
    path.write_text("\n".join(lines)) if random.random() < 0.5 else _rewrite(path, damaged, random)
    _enter(folder, "keys", path)


def _change_shard(folder: Path, random: Random, names: Names) -> None:
    path = _one_of(folder, "*.tar", random)
    _rewrite(path, changed_tar, random, names)
    _enter_shard(folder, path, random)


def _change_stored_image(folder: Path, random: Random, names: Names) -> None:
    """Damage the bytes of one image in place, so that index and tar still fit."""
    path = _one_of(folder, "*.tar", random)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = random.choice([m for m in tar.getmembers() if not m.name.endswith(".cls")])
    place = slice(member.offset_data, member.offset_data + member.size)
    data[place] = changed_image(bytes(data[place]), random)[: member.size].ljust(member.size, b"\0")
    path.write_bytes(data)
    _enter_shard(folder, path, None)


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


def _change_photo(folder: Path, random: Random, names: Names) -> None:
    _rewrite(_one_of(folder, "*/changed.*", random), changed_image, random)


def _change_text(pattern: str) -> Callable[[Path, Random, Names], None]:
    def change(folder: Path, random: Random, names: Names) -> None:
        path = _one_of(folder, pattern, random)
        text = path.read_text()
        cells = [*names, "\x1b[2J", '"', '""', ",", "\n", "\0", "-1", "1e309", "9" * 400, "x" * 140_000, "\ufeff", "=1"]
        match random.choice(("bytes", "cell", "cell", "line", "encoding")):
            case "bytes":
                _rewrite(path, damaged, random)
            case "cell":
                lines = [line.split(",") for line in text.split("\n")]
                line = random.choice(lines)
                line[random.randrange(len(line))] = random.choice(cells)
                path.write_bytes("\n".join(map(",".join, lines)).encode(errors="surrogatepass"))
            case "line":
                lines_ = text.split("\n")
                at = random.randrange(len(lines_))
                lines_[at : at + random.randrange(2)] = [random.choice([*cells, *lines_])] * random.choice((1, 2, 500))
                path.write_bytes("\n".join(lines_).encode())
            case _:
                path.write_bytes(text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-7", "cp037"))))

    return change


def _change_parquet(folder: Path, random: Random, names: Names) -> None:
    """Damage the file, or write it anew with other values and types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "images.parquet"
    if random.random() < 0.6:
        _rewrite(path, damaged, random)
        return
    table = pq.read_table(path)
    rows = table.to_pylist()
    metadata = dict(table.schema.metadata or {})
    for _ in range(random.randint(1, 2)):
        row = random.choice(rows)
        match random.choice(("image", "label", "labels", "metadata", "column")):
            case "image":
                row["image"] = {
                    "bytes": changed_image(row["image"]["bytes"] or b"", random),
                    "path": random.choice(names),
                }
            case "label":
                row["label"] = random.choice((-1, 2, 10**8, None, 2**62))
            case "labels":
                values = random.choice(
                    (["a", "b"], [0.5, 1.5], [True, False], [[1], [2]], [None, None], [{"a": 1}] * 2)
                )
                for i, each in enumerate(rows):
                    each["label"] = values[i % 2]
                break
            case "metadata":
                metadata[b"huggingface"] = changed_json(metadata[b"huggingface"], random, names)
            case _:
                old, new = random.choice(("image", "label")), random.choice(("img", "labels", "image", "x", "\x1b[2J"))
                rows = [{(new if key == old else key): value for key, value in each.items()} for each in rows]
                break
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), path)


def _change_labels(folder: Path, random: Random, names: Names) -> None:
    """Write another label into a shard."""
    path = _one_of(folder, "*.tar", random)
    texts = [*names, *map(str, (-1, -7, 99, 10**8, 2**70, True, 1.5, "nan", "\x1b[2J", "", "1" * 5000, "\0", "é"))]
    with tarfile.open(path) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old.getmembers()]  # type: ignore[union-attr]
    at = random.choice([i for i, (name, _) in enumerate(members) if name.endswith((".cls", ".json"))])
    name, data = members[at]
    if name.endswith(".json"):
        data = changed_json(data, random, names)
    else:
        data = damaged(data, random) if random.random() < 0.3 else random.choice(texts).encode()
    if random.random() < 0.1:
        data = bytes(1_000_001)
    members[at] = (name, data)
    path.write_bytes(_tar(members))


def _change_json_file(pattern: str) -> Callable[[Path, Random, Names], None]:
    return lambda folder, random, names: _rewrite(_one_of(folder, pattern, random), changed_json, random, names)


def _change_cifar(folder: Path, random: Random, names: Names) -> None:
    path = _one_of(folder, "*", random)
    if random.random() < 0.6:
        _rewrite(path, damaged, random)
        return
    content = pickle.loads(path.read_bytes())
    key = random.choice(sorted(content))
    content[key] = random.choice(
        (
            hostile_value(random, names),
            np.zeros((2, 3072), "O"),
            np.zeros((2, 3072), "f8"),
            np.zeros(0, "u1"),
            [1, -1],
            Path(),
        )
    )
    path.write_bytes(pickle.dumps(content, protocol=random.choice((0, 1, 2, 4))))


def _change_job(folder: Path, random: Random, names: Names) -> None:
    path = folder / "job.yaml"
    text = path.read_text()
    if random.random() < 0.2:
        _rewrite(path, damaged, random)
    elif random.random() < 0.25:
        values = [
            "&a [*a]", "!!python/object/apply:os.system ['id']", "1e309", ".inf", "-.nan", "${HOME}", "${", "0o17", "{",
            "[" * 500, "<<: *x", "2001-01-01", "!!binary AAAA", "&b {c: *b}", "'", "1_000", "0x" + "f" * 99, "? a", "~",
            "[&z [0,0,0,0,0,0,0,0,0,0], " + ", ".join(["*z"] * 3000) + "]", "9" * 5000, "\x1b[2J", "1:30",
        ]  # fmt: skip
        lines = text.split("\n")
        at = random.randrange(len(lines))
        lines[at] = lines[at].partition(":")[0] + ": " + random.choice(values)
        path.write_text("\n".join(lines))
    else:
        value = changed_value(yaml.safe_load(text), random, names)
        path.write_text(yaml.safe_dump(value, allow_unicode=random.random() < 0.5), errors="backslashreplace")


def _change_run(folder: Path, random: Random, names: Names) -> None:
    """Change a record, a picture, a file of a checkpoint, or the name of a file or a folder."""
    run = folder / "run"
    checkpoint = _one_of(run, "checkpoints/*", random)
    match random.choice(("run", "run", "summary", "score", "score", "facts", "metrics", "grid", "rename")):
        case "run":
            _rewrite(run / "run.json", changed_json, random, names)
        case "summary":
            _rewrite(run / "summary.json", changed_json, random, names)
        case "score":
            _rewrite(_one_of(run, "scores/*", random), changed_json, random, names)
        case "facts":
            _rewrite(checkpoint / "checkpoint.json", changed_json, random, names)
            _refit(checkpoint)
        case "metrics":
            newest = max(run.glob("checkpoints/*"))
            _rewrite(newest / "metrics.jsonl", random.choice((changed_json, damaged_text)), random, names)
            _refit(newest)
        case "grid":
            _rewrite(_one_of(run, "grids/*", random), changed_image, random)
        case _:
            path = random.choice([checkpoint, _one_of(run, "scores/*", random), _one_of(run, "grids/*", random)])
            path.rename(path.with_name(random.choice(("-1-x", "abc", "\x1b[2J", "1" * 100, "0-0", " ", "é", "~.json"))))


def damaged_text(data: bytes, random: Random, names: Names) -> bytes:
    return damaged(data, random)


def _change_sweep(folder: Path, random: Random, names: Names) -> None:
    path = folder / random.choice(("sweep/run.json", "sweep/summary.json", "sweep/trials.json", "sweep/plane.png"))
    if path.suffix == ".png":
        _rewrite(path, changed_image, random)
    else:
        _rewrite(path, changed_json, random, names)


def _change_checkpoint(folder: Path, random: Random, names: Names) -> None:
    checkpoint = folder / "checkpoint"
    match random.choice(("facts", "facts", "tensors", "tensors", "checkpoint", "manifest")):
        case "facts":
            _rewrite(checkpoint / "state.json", changed_json, random, names)
        case "tensors":
            _rewrite(checkpoint / "state.safetensors", changed_tensors, random, names)
        case "checkpoint":
            _rewrite(checkpoint / "checkpoint.json", changed_json, random, names)
        case _:
            _rewrite(checkpoint / MANIFEST, changed_json, random, names)
            return
    if random.random() < 0.9:
        _refit(checkpoint)


def _change_model(folder: Path, random: Random, names: Names) -> None:
    match random.choice(("facts", "facts", "tensors", "tensors", "manifest", "code")):
        case "facts":
            _rewrite(folder / "config.json", changed_json, random, names)
        case "tensors":
            _rewrite(folder / "generator.safetensors", changed_tensors, random, names)
        case "code":
            path = folder / "code" / "sagan" / "__init__.py"
            path.write_text(CODE.format(path=random.choice(names)) + path.read_text())
        case _:
            _rewrite(folder / MANIFEST, changed_json, random, names)
            return
    if random.random() < 0.9:
        _refit(folder)


def _change_statistics(folder: Path, random: Random, names: Names) -> None:
    stored = _one_of(folder, "collection/evaluation/*", random)
    if random.random() < 0.5:
        _rewrite(stored / MANIFEST, changed_json, random, names)
        return
    _rewrite(_one_of(stored, "*.safetensors", random), changed_tensors, random, names)
    _refit(stored)


def _refit(folder: Path) -> None:
    """Write the manifest of a set of files anew, with its facts."""
    facts = _facts(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_bytes(Manifest.of(folder, **facts).to_bytes())


def _facts(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(str(folder))
    return {} if manifest is None else manifest.facts


def _change_rows(folder: Path, random: Random, names: Names) -> None:
    """Write a table of rows as a client sends it; Python's pickle keeps values that JSON does not have."""
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    for _ in range(random.choice((1, 1, 2))):
        row, key = random.choice(rows), random.choice(("class", "seed", "truncation", "other", ""))
        row[key] = hostile_value(random, names)
    if random.random() < 0.05:
        tables: list[list[dict[str, Any]]] = [[], rows * 400, [{}] * 1025, [{}] * 70]
        rows = random.choice(tables)
    (folder / "rows.pkl").write_bytes(pickle.dumps(rows))


# --- readers that are no commands ------------------------------------------------------------------------------------


def _predict(source: Path, out: Path) -> None:
    """Give the rows to the model as MLflow's loader serves it."""
    import mlflow.pyfunc
    import pandas as pd  # type: ignore[import-untyped]
    from mlflow.exceptions import MlflowException

    model = mlflow.pyfunc.load_model(str(source / "served"))
    changed = source / "rows.pkl"
    rows = pickle.loads(changed.read_bytes()) if changed.exists() else json.loads((source / "rows.json").read_text())
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names}
    try:
        answer = model.predict(pd.DataFrame(columns, index=range(len(rows))))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        print(f"error: {error.message}")
        raise SystemExit(2) from None
    assert len(answer) == len(rows)
    (out / "answer.json").write_text(answer.to_json(orient="records"))


# --- right results ---------------------------------------------------------------------------------------------------


def _is_good(out: Path, printed: str) -> bool:
    return "all are good" in printed


def _is_packed(out: Path, printed: str) -> bool:
    """Whether `sagan verify` accepted what was packed, and every label is one of a class."""
    if not (out / "collection").exists():
        return "all are good" in printed  # shards that were indexed in place
    collection = Collection.open(str(out / "collection"))
    classes = max(1, len(collection.class_names))
    return "all are good" in printed and bool(((collection.labels >= 0) & (collection.labels < classes)).all())


def _is_json(out: Path, printed: str) -> bool:
    """Whether the command printed one JSON object without NaN and infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return isinstance(json.loads(printed[printed.index("{") :], parse_constant=refuse), dict)
    except ValueError:
        return False


def _is_page(out: Path, printed: str) -> bool:
    page = (out / "report.html").read_text()
    return page.rstrip().endswith("</html>") and "<script>alert" not in page and 'href="javascript' not in page


def _is_picture(out: Path, printed: str) -> bool:
    with Image.open(out / "samples.png") as image:
        return min(image.size) >= 32


def _are_answers(out: Path, printed: str) -> bool:
    for row in json.loads((out / "answer.json").read_text()):
        with Image.open(io.BytesIO(base64.b64decode(row["png"]))) as image:
            if image.size != (32, 32) or row["class"] not in ("ant", "bee"):
                return False
    return True


# --- clean inputs ----------------------------------------------------------------------------------------------------


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _picture(number: int, extension: str = "png", side: int = 32) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(noise).resize((side, side))
    image.save(out, Image.registered_extensions()[f".{extension}"], **FORMATS[extension])
    return out.getvalue()


def _photos(folder: Path, count: int, changed: str | None = None) -> None:
    for number in range(count):
        path = folder / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_picture(number))
    if changed is not None:
        (folder / "ant" / f"changed.{changed}").write_bytes(_picture(99, changed, 40))


def build(root: Path) -> None:
    """Write the clean input of every kind below `root`, with the project's own functions."""
    with contextlib.redirect_stdout(io.StringIO()):
        _build(root)


def _build(root: Path) -> None:
    for extension in FORMATS:
        _photos(root / f"photos-{extension}", 2, extension)
    for encoding in ("png", "jpeg", "webp"):
        _photos(root / "photos" / "train", 8)
        _photos(root / "photos" / "heldout", 3)
        source = {split: str(root / "photos" / split) for split in ("train", "heldout")}
        section = PackSection(source=source, resolution=32, encoding=encoding, shard_images=4)
        pack(str(root / f"collection-{encoding}"), section, lambda done, total: None)
    _build_sources(root)
    _build_runs(root)


def _build_sources(root: Path) -> None:
    table = root / "table"
    _photos(table / "images", 3)
    rows = [f"images/{('ant', 'bee')[n % 2]}/{n}.png,{('ant', 'bee')[n % 2]}" for n in range(3)]
    (table / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")

    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "parquet").mkdir()
    images = [{"image": {"bytes": _picture(n), "path": f"{n}.png"}, "label": n % 2} for n in range(3)]
    features = {"info": {"features": {"label": {"names": ["ant", "bee"]}}}}
    content = pa.Table.from_pylist(images).replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(content, root / "parquet" / "images.parquet")

    (root / "shards").mkdir()
    members = [part for n in range(3) for part in ((f"{n}.png", _picture(n)), (f"{n}.cls", str(n % 2).encode()))]
    members += [("3.png", _picture(3)), ("3.json", b'{"label": 1, "text": "x"}')]
    (root / "shards" / "00000.tar").write_bytes(_tar(members))
    (root / "tar").mkdir()
    files = [(f"{('ant', 'bee')[n % 2]}/{n}.png", _picture(n)) for n in range(3)]
    (root / "tar" / "photos.tar").write_bytes(_tar([*files, ("bee/inner.tar", _tar([("4.png", _picture(4))]))]))

    _photos(root / "stylegan" / "00000", 3)
    labels = [[str(path.relative_to(root / "stylegan")), i % 2] for i, path in enumerate(root.glob("stylegan/*/*/*"))]
    (root / "stylegan" / "dataset.json").write_text(json.dumps({"labels": labels}))

    cifar = root / "cifar" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch"):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": [0, 1], "filenames": [f"{name}-{i}.png" for i in range(2)]}
        (cifar / name).write_bytes(pickle.dumps(batch, protocol=2))
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": ["ant", "bee"]}, protocol=2))

    data = {"train": str(root / "collection-png"), "lanes": 2}
    train = {"kind": "train", "name": "tiny", "data": data, "model": {**NETWORKS.to_dict(), "num_classes": 2}}
    train |= {"optim": OptimConfig().to_dict(), "train": {"kimg": 1, "batch": 4, "workers": 2}}
    train |= {"evaluate": {"extractor": "classifier", "samples": 10}, "resources": {"env": {"A": "b"}}}
    (root / "job").mkdir()
    (root / "job" / "job.yaml").write_text(yaml.safe_dump(_lists(train)))
    (root / "sweep-job").mkdir()
    (root / "sweep-job" / "base.yaml").write_text(yaml.safe_dump(_lists(train)))
    space = {"optim.lr_d": {"loguniform": [1e-4, 1e-3]}, "train.batch": {"choice": [4, 8]}}
    sweep = {"kind": "tune", "name": "sweep", "base": "base.yaml", "space": space, "overrides": {"train.kimg": 2}}
    sweep |= {"search": {"trials": 2, "initial_points": [{"optim.lr_d": 2e-4}]}, "schedule": {"grace_kimg": 1}}
    (root / "sweep-job" / "job.yaml").write_text(yaml.safe_dump(sweep))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _build_runs(root: Path) -> None:
    """A run with two scored checkpoints, its collection with a classifier beside it, a sweep, and exported models."""
    folder = root / "runs"
    collection = Collection.open(str(shutil.copytree(root / "collection-png", folder / "collection")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = Classifier(32, 2).eval().state_dict()
    facts = {"resolution": 32, "classes": 2, "seed": 0, "heldout_accuracy": 0.5}
    expected = {name: tensor.to("meta") for name, tensor in tensors.items()}
    _, _, digest = derived(collection, "classifier-v1-seed0", lambda: (tensors, facts), expected, NoFacts)
    protocol = ScoreProtocol(
        extractor="classifier", extractor_digest=digest, resize="none", reference_digest=collection.digest,
        split="train", samples=4, seed=0, weights="ema", batch_norm="running",
    )  # fmt: skip
    run = StoredRun(str(folder / "run"))
    section = EvaluateSection(extractor="classifier", samples=4, standing_images=None)
    record = RunRecord(
        name="run", method={"data.collection": collection.digest, "optim.lr_d": 4e-4}, mlflow_run_id="0",
        data=RecordedData.of(DataSection(train=collection.url)), evaluate=RecordedEvaluation.of(section),
    )  # fmt: skip
    run.write_record(record)
    scores = []
    for images in (1000, 2000):
        checkpoint = _checkpoint(run, images, collection)
        score = Score.of(protocol, "fd_classifier", False, {"fd_classifier": 5000.0 / images})
        scores.append(score)
        run.write_score(
            ScoreRecord(checkpoint=checkpoint.name, images=images, score=score, seconds=1.0, time_ms=images)
        )
        (folder / "run" / "grids").mkdir(exist_ok=True)
        (folder / "run" / "grids" / f"{checkpoint.name}.png").write_bytes(_picture(images, "png", 64))
    summary: dict[str, Any] = {"mlflow_run_id": "0", "score": scores[-1], "final": scores[0], "grid": "grid.png"}
    run.write_summary(
        TrainSummary(
            name="run",
            images=2000,
            seconds=1.0,
            images_per_s=2000.0,
            resumed_from=None,
            restarts=0,
            images_lost=0,
            registered={"model": "run", "version": 1, "alias": "champion"},
            **summary,
        )
    )
    sweep = StoredSweep(str(folder / "sweep"))
    sweep.write_record(SweepRecord(name="sweep", mlflow_run_id="0", method={"space.optim.lr_d": {"choice": [1e-4]}}))
    trials = [
        Trial(name="sweep-a", point={"optim.lr_d": 1e-3}, score=None, kimg=1, outcome="diverged"),
        Trial(name="run", point={"optim.lr_d": 4e-4}, score=2.5, kimg=2, outcome="finished"),
    ]
    sweep.write_trials(SweepTrials(trials=trials))
    plane = folder / "sweep" / "plane.png"
    plane.write_bytes(_picture(5, "png", 64))
    sweep.write_summary(
        SweepSummary(name="sweep", trials=2, stopped_early=0, best=trials[1], picture=str(plane), **summary)
    )
    model = Model.from_state(TrainState(NETWORKS, OptimConfig(), 0), standing_images=None, class_names=["ant", "bee"])
    model.save(root / "model")
    _refit(root / "model")
    (root / "predict").mkdir()
    registry._packaged(root / "model", root / "predict" / "served")
    rows = [{"class": "ant", "seed": 1, "truncation": 0.5}, {"class": 1}, {}]
    (root / "predict" / "rows.json").write_text(json.dumps(rows))
    shutil.copytree(root / "collection-png", root / "evaluated" / "collection")
    shutil.copytree(folder / "collection" / "evaluation", root / "evaluated" / "collection" / "evaluation")
    shutil.copytree(root / "model", root / "evaluated" / "model")
    shutil.copytree(run.checkpoints()[-1].url, root / "evaluated" / "checkpoint")


def _checkpoint(run: StoredRun, images: int, collection: Collection) -> StoredCheckpoint:
    state = TrainState(NETWORKS, OptimConfig(), images)
    state.images = images
    local = Path(run.url).parent / f"local-{images}"
    local.mkdir()
    metrics = local.with_suffix(".jsonl")
    metrics.write_text(json.dumps({"step": images, "time_ms": 0, "metrics": {"loss_d": 1.5, "gamma_g": 0.25}}) + "\n")
    facts = CheckpointFacts(
        images=images, train_seconds=1.0, to_score=True, collection_digest=collection.digest,
        class_names=collection.class_names, method_digest="ab" * 32, git_commit="unknown",
    )  # fmt: skip
    checkpoint = run.checkpoint(write_checkpoint(local, state, metrics, facts))
    upload_checkpoint(local, checkpoint)
    shutil.rmtree(local)
    metrics.unlink()
    return checkpoint


# --- the kinds -------------------------------------------------------------------------------------------------------

_VERIFY = command("verify IN")
_AGAIN = "pack train=CLEAN/photos/train heldout=CLEAN/photos/heldout IN --resolution 32 --encoding png --shard-images 4"
_EVALUATE = "--extractor classifier --samples 4 --running --json --gpus 0"


def _pack(source: str = "IN", *options: str) -> Callable[[Path, Path], None]:
    line = " ".join(["pack", source, "OUT/collection --resolution 32", *options])
    return command(line, "verify OUT/collection")


def _verified(share: int, change: Callable[[Path, Random, Names], object], encoding: str = "png") -> Kind:
    return Kind(share, f"collection-{encoding}", change, _VERIFY, _is_good)


KINDS = {
    "manifest": _verified(10, _change_manifest),
    "index": _verified(10, _change_index),
    "keys": _verified(3, _change_keys),
    "shard": _verified(10, _change_shard),
    **{f"stored {name}": _verified(4, _change_stored_image, name) for name in ("png", "jpeg", "webp")},
    **{f"image {name}": Kind(4, f"photos-{name}", _change_photo, _pack(), _is_packed) for name in FORMATS},
    "table csv": Kind(6, "table", _change_text("table.csv"), _pack("IN/table.csv"), _is_packed),
    "parquet": Kind(8, "parquet", _change_parquet, _pack("IN/images.parquet"), _is_packed),
    "tar of images": Kind(6, "tar", partial(lambda f, r, n: _rewrite(f / "photos.tar", changed_tar, r, n)),
                          _pack("IN/photos.tar"), _is_packed),
    "labels": Kind(6, "shards", _change_labels, _pack(), _is_packed),
    "labels, indexed": Kind(4, "shards", _change_labels, command("pack IN --index-only", "verify IN"), _is_packed),
    "dataset.json": Kind(4, "stylegan", _change_json_file("dataset.json"), _pack(), _is_packed),
    "cifar": Kind(4, "cifar", lambda f, r, n: _change_cifar(f / "cifar-10-batches-py", r, n), _pack(), _is_packed),
    "collection, repacked": Kind(
        4,
        "collection-png",
        lambda f, r, n: r.choice((_change_manifest, _change_index, _change_shard))(f, r, n),
        _pack(),
        _is_packed,
    ),
    "pack.json": Kind(1, "collection-png", _change_json_file("pack.json"), command(_AGAIN, "verify IN"), _is_packed),
    "job": Kind(10, "job", _change_job, command("run IN/job.yaml --dry-run --json"), _is_json),
    "sweep job": Kind(5, "sweep-job", _change_job, command("run IN/job.yaml --dry-run --json"), _is_json),
    "run": Kind(8, "runs", _change_run, command("report IN/run --samples 4 --reference IN/collection"), _is_page),
    "sweep": Kind(3, "runs", _change_sweep, command("report IN/sweep --samples 4 --reference IN/collection"), _is_page),
    "checkpoint": Kind(
        6, "evaluated", _change_checkpoint,
        command(f"evaluate IN/checkpoint --reference IN/collection {_EVALUATE}"), _is_json,
    ),
    "model": Kind(8, "model", _change_model, command("sample IN --n 2"), _is_picture),
    "statistics": Kind(
        5, "evaluated", _change_statistics,
        command(f"evaluate IN/model --reference IN/collection {_EVALUATE}"), _is_json,
    ),
    "rows": Kind(8, "predict", _change_rows, _predict, _are_answers),
}  # fmt: skip
