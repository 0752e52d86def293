"""Storage over a real S3 server: the same promises as on disk, and every way in which it can be wrong told apart."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.local.servers import S3
from pipeline.collection.manifest import Collection
from pipeline.collection.verify import verify_collection
from pipeline.config.schema import DataSection, PackSection
from pipeline.errors import CorruptError, EnvironmentFault, UsageError
from pipeline.packing.pack import pack
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import file_sets, files, filesystems
from pipeline.streaming.stream import Stream
from sagan.ranks import World
from tests.closed_port import closed_port, url_of

pytestmark = pytest.mark.system


@pytest.fixture
def bucket(s3: Any) -> str:
    return str(s3.bucket())


def test_objects_are_written_read_listed_and_deleted(bucket: str, tmp_path: Path) -> None:
    url = files.join(bucket, "runs")
    files.write_json(files.join(url, "a/x.json"), {"k": [1, 2]})
    files.write_bytes(files.join(url, "ab"), b"beside")
    assert files.read_json(files.join(url, "a/x.json")) == {"k": [1, 2]}
    assert files.list_names(url) == ["a", "ab"]
    assert files.list_files(url) == ["a/x.json", "ab"]
    (tmp_path / "local").write_bytes(b"12345")
    files.upload(tmp_path / "local", files.join(url, "a/up"))
    files.download(files.join(url, "a/up"), tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"12345"
    files.delete(files.join(url, "a"))
    assert files.list_files(url) == ["ab"], "only what is below the folder goes, not what begins like it"
    files.delete(files.join(url, "a"))


def test_a_large_object_survives_the_way_there_and_back(bucket: str, tmp_path: Path) -> None:
    """Beyond s3fs's block size it goes in parts, whose checksums not every server gets right."""
    data = np.random.default_rng(0).integers(0, 256, 60_000_000, dtype=np.uint8).tobytes()
    (tmp_path / "up").write_bytes(data)
    files.upload(tmp_path / "up", files.join(bucket, "large"))
    files.download(files.join(bucket, "large"), tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == data
    assert files.read_bytes(files.join(bucket, "large")) == data


def test_what_is_not_there(bucket: str, tmp_path: Path) -> None:
    url = files.join(bucket, "no/such")
    assert not files.exists(url)
    assert files.list_names(url) == []
    assert files.list_files(url) == []
    with pytest.raises(FileNotFoundError, match=url):
        files.read_bytes(url)
    with pytest.raises(FileNotFoundError, match=url):
        files.download(url, tmp_path / "x")


def test_listings_are_fresh_when_another_process_writes(bucket: str) -> None:
    files.write_bytes(files.join(bucket, "a/x"), b"1")
    assert files.list_names(files.join(bucket, "a")) == files.list_files(files.join(bucket, "a")) == ["x"]
    assert not files.exists(files.join(bucket, "a/y"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(files.write_bytes, (files.join(bucket, "a/y"), b"1"))
    assert files.list_names(files.join(bucket, "a")) == files.list_files(files.join(bucket, "a")) == ["x", "y"]
    assert files.exists(files.join(bucket, "a/y"))


def test_a_forked_process_makes_its_own_client(bucket: str) -> None:
    files.write_bytes(files.join(bucket, "x"), b"from the parent")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(files.read_bytes, (files.join(bucket, "x"),)).get(timeout=60) == b"from the parent"


def test_threads_share_a_client(bucket: str) -> None:
    def there_and_back(i: int) -> bytes:
        files.write_bytes(files.join(bucket, str(i)), b"%d" % i)
        return files.read_bytes(files.join(bucket, str(i)))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, range(40))) == [b"%d" % i for i in range(40)]


CALLS = {
    "read": lambda url, folder: files.read_bytes(f"{url}/x"),
    "write": lambda url, folder: files.write_bytes(f"{url}/x", b""),
    "exists": lambda url, folder: files.exists(f"{url}/x"),
    "list": lambda url, folder: files.list_names(url),
    "download": lambda url, folder: files.download(f"{url}/x", folder / "x"),
    "check": lambda url, folder: files.check_writable(url),
    "delete": lambda url, folder: files.delete(f"{url}/x"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("variable", "value", "cause", "remedy"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "secret key does not match", "AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "NOBODY", "does not know this key id", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials_are_told_apart(
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    variable: str,
    value: str,
    cause: str,
    remedy: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(EnvironmentFault, match=cause) as caught:
        CALLS[call](bucket, tmp_path)
    assert bucket in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("call", CALLS)
def test_a_bucket_that_does_not_exist_is_named(s3: Any, tmp_path: Path, call: str) -> None:
    with pytest.raises(EnvironmentFault, match="bucket 'no-such-bucket' does not exist"):
        CALLS[call]("s3://no-such-bucket/runs", tmp_path)


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_server_that_is_down_is_named(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with closed_port() as held:
        endpoint = url_of(held)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(EnvironmentFault, match=f"s3://bucket.*at {endpoint}: the storage cannot be reached"):
            CALLS[call]("s3://bucket/runs", tmp_path)


def test_no_credentials_at_all(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(EnvironmentFault, match="no credentials found"):
        files.list_names("s3://bucket/runs")


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_the_client_of_a_proxy_is_not_kept(bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A proxy that was set for a while decides nothing afterwards, also where nothing was stored before."""
    filesystems._filesystem.cache_clear()
    with closed_port() as held, monkeypatch.context() as proxied:
        proxied.setenv(variable, url_of(held))
        proxied.setenv("no_proxy", "")
        proxied.setenv("NO_PROXY", "")
        with pytest.raises(EnvironmentFault):
            files.write_bytes(f"{bucket}/a.bin", b"1")
    files.write_bytes(f"{bucket}/a.bin", b"2")
    assert files.read_bytes(f"{bucket}/a.bin") == b"2"


def test_sets_are_committed_verified_and_removed(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.bin").write_bytes(b"state")
    url = files.join(bucket, "checkpoints/1")
    manifest = file_sets.upload_set(tmp_path / "set", url, images=1)
    assert file_sets.fetch_set(url, tmp_path / "copy") == file_sets.verify_set(url) == manifest
    files.write_bytes(files.join(url, "state.bin"), b"spate")
    with pytest.raises(CorruptError, match=r"state\.bin"):
        file_sets.verify_set(url)
    file_sets.remove_set(url)
    assert file_sets.read_manifest(url) is None


def test_packing_a_fresh_start_and_retention_delete_nothing_of_a_neighbour(bucket: str, tmp_path: Path) -> None:
    """`set[1]` as a pattern names the folder `set1`, and not the folder `set[1]`."""
    foreign = ["set1/.packing/x.json", "exp1/runs/tiny/run.json", "exp1/runs/tiny/checkpoints/1/manifest.json"]
    for key in foreign:
        files.write_bytes(files.join(bucket, key), b"foreign")
    pack(f"{bucket}/set[1]", PackSection(source="digits", resolution=32, shard_images=1000))
    packed = files.list_names(f"{bucket}/set[1]")
    assert not [name for name in packed if name.startswith(".")], "receipts and probes are gone"
    run = StoredRun(f"{bucket}/exp[1]/runs/tiny")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.bin").write_bytes(b"state")
    for name in ("1", "2"):
        file_sets.upload_set(tmp_path / "set", run.checkpoint(name).url)
    file_sets.remove_set(run.checkpoint("1").url)  # retention
    assert files.list_names(run.checkpoints_url) == ["2"]
    run.delete()  # --fresh
    assert files.list_names(f"{bucket}/exp[1]") == []
    assert all(files.read_bytes(files.join(bucket, key)) == b"foreign" for key in foreign)


class TestCollection:
    """Packing to and streaming from a bucket."""

    @pytest.fixture(scope="class")
    @classmethod
    def url(cls, s3: Any) -> str:
        return files.join(s3.bucket(), "digits")

    @pytest.fixture(scope="class")
    @classmethod
    def collection(cls, url: str) -> Collection:
        return pack(url, PackSection(source="digits", resolution=32, shard_images=200))

    @pytest.fixture
    def stream(self, collection: Collection, tmp_path: Path) -> Iterator[Stream]:
        data = DataSection(train=collection.url, cache=str(tmp_path / "cache"), lanes=4, window=50)
        stream = Stream(collection, "train", seed=1, world=World(), data=data)
        yield stream
        stream.close()

    def test_a_bucket_and_a_folder_hold_the_same_bytes(self, collection: Collection, tmp_path: Path) -> None:
        local = pack(str(tmp_path / "digits"), PackSection(source="digits", resolution=32, shard_images=200))
        assert local.digest == collection.digest
        assert verify_collection(collection.url).digest == collection.digest

    def test_an_epoch_is_fetched_once_and_every_image_seen_once(
        self, collection: Collection, stream: Stream, tmp_path: Path
    ) -> None:
        n = collection.size("train")
        labels = [batch.labels for batch, _ in zip(stream.batches(0, n), range(1), strict=False)]
        assert np.bincount(labels[0]).tolist() == np.bincount(collection.labels[:n]).tolist()
        cached = sorted(p.name for p in (tmp_path / "cache").iterdir() if p.suffix == "")
        assert cached == sorted(shard.sha256 for shard in collection.shards if shard.split == "train")

    def test_a_shard_damaged_in_the_bucket_is_never_decoded(
        self, s3: Any, collection: Collection, tmp_path: Path
    ) -> None:
        url = files.join(s3.bucket(), "damaged")
        for name in files.list_names(collection.url):
            files.write_bytes(files.join(url, name), files.read_bytes(files.join(collection.url, name)))
        shard = files.join(url, collection.shards[0].name)
        data = bytearray(files.read_bytes(shard))
        data[len(data) // 2] ^= 1
        files.write_bytes(shard, bytes(data))
        section = DataSection(train=url, cache=str(tmp_path / "cache"))
        stream = Stream(Collection.open(url), "train", seed=0, world=World(), data=section)
        with pytest.raises(CorruptError, match=collection.shards[0].name):
            next(stream.batches(0, collection.size("train")))
        stream.close()
        with pytest.raises(CorruptError, match=collection.shards[0].name):
            verify_collection(url)

    def test_no_collection_where_the_url_points(self, bucket: str) -> None:
        with pytest.raises(UsageError, match="holds no packed collection") as caught:
            Collection.open(files.join(bucket, "nothing"))
        assert "sagan pack" in caught.value.remedy

    def test_images_in_a_bucket_pack_like_local_ones(self, bucket: str, images: Path, tmp_path: Path) -> None:
        for name in files.list_files(str(images)):
            files.upload(images / name, files.join(bucket, "source", name))
        section = PackSection(source=str(images), resolution=32)
        local = pack(str(tmp_path / "local"), section)
        remote = pack(files.join(bucket, "remote"), section.model_copy(update={"source": files.join(bucket, "source")}))
        assert remote.digest == local.digest


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    for label, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        for i in range(3):
            path = tmp_path / "images" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + i, 50), colour).save(path)
    return tmp_path / "images"


def test_a_stream_outlives_a_restart_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards that are still missing are fetched once it is back."""
    with S3(tmp_path / "s3") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        collection = pack(
            f"{server.bucket('restart')}/digits", PackSection(source="digits", resolution=32, shard_images=100)
        )
    data = DataSection(train=collection.url, cache=str(tmp_path / "cache"), lanes=1, window=1)
    stream = Stream(collection, "train", seed=0, world=World(), data=data)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, stream.batches(0, 64))
        with S3(tmp_path / "s3", port=server.port, credentials=server.credentials):
            assert first.result(timeout=120).labels.shape == (64,)
    stream.close()


def test_the_buckets_of_a_server_are_listed(bucket: str) -> None:
    assert files.name(bucket) in files.list_names("s3://")
