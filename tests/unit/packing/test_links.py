"""Links are followed inside a source, in a tar as in a folder. What leads out of a tar is listed as left out."""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from pipeline.collection.verify import verify_collection
from pipeline.config.schema import PackSection
from pipeline.errors import CorruptError, UsageError
from pipeline.packing import archives_and_folders
from pipeline.packing.archives_and_folders import Tree
from pipeline.packing.pack import pack
from pipeline.packing.recognise import open_source
from pipeline.storage import files
from tests.unit.packing.coloured_images import by_colour, picture, png, tar, write
from tests.unit.packing.read_collection import bytes_of


def tar_with_links(path: Path, contents: dict[str, bytes], links: dict[str, str], kind: bytes = tarfile.SYMTYPE) -> str:
    with tarfile.open(path, "w") as file:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Real images in b and c, hard links to c in a, links to b in d, and a link to a whole folder."""
    root = write(tmp_path / "photos", {f"{name}/{n}.png": picture(n, ord(name)) for name in "bc" for n in range(6)})
    (root / "a").mkdir()
    (root / "d").mkdir()
    for n in range(6):
        os.link(root / "c" / f"{n}.png", root / "a" / f"{n}.png")
        (root / "d" / f"{n}.png").symlink_to(f"../b/{n}.png")
    (root / "e").symlink_to("d")
    return root


def test_a_tar_of_links_packs_like_its_folder(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        file.add(photos, "photos")
    folder = pack(f"{tmp_path}/1", PackSection(source=str(photos), resolution=32))
    assert (folder.size("train"), folder.class_names) == (30, list("abcde"))
    pack(f"{tmp_path}/2", PackSection(source=f"{tmp_path}/photos.tar", resolution=32))
    assert bytes_of(tmp_path / "2") == bytes_of(tmp_path / "1")


@pytest.mark.parametrize(
    ("target", "kind"),
    [("/etc/passwd", tarfile.SYMTYPE), ("../../../x.png", tarfile.SYMTYPE), ("no/such.png", tarfile.LNKTYPE)],
)
def test_a_link_out_of_a_tar_is_listed(
    target: str, kind: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tar_with_links(tmp_path / "set.tar", {"a/1.png": picture(1)}, {"a/2.png": target}, kind)
    assert pack(f"{tmp_path}/out", PackSection(source=place, resolution=32)).size("train") == 1
    assert "left out  1  .png  a link" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../x.png", "a/../../x.png"])
def test_a_member_with_a_path_out_of_the_tar_is_listed(name: str, tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tar({"a/1.png": picture(1), name: picture(2)}))
    source = open_source(f"{tmp_path}/set.tar")
    assert source.keys == ["a/1.png"]
    assert source.left_out == {("its path leads out of the tar", ".png"): (1, name)}


@pytest.mark.parametrize("target", ["nothing.png", "2.png"], ids=["dangling", "itself"])
def test_a_link_to_nothing_is_broken_in_a_tar_as_in_a_folder(target: str, tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"a/1.png": picture(1)})
    (root / "a" / "2.png").symlink_to(target)
    for place in (str(root), tar_with_links(tmp_path / "set.tar", {"a/1.png": picture(1)}, {"a/2.png": target})):
        with pytest.raises(UsageError, match=r"a/2\.png: the file does not exist"):
            pack(f"{tmp_path}/out", PackSection(source=place, resolution=32))


def test_links_are_counted_over_a_whole_path_in_a_tar_as_in_a_folder(tmp_path: Path) -> None:
    """Each of 20 links follows the next one twice: 2 to the power of 20 steps."""
    root = write(tmp_path / "set", {"d/e/1.png": picture(1)})
    links = {f"d/{n}": f"{n + 1}/../{n + 1}" for n in range(20)} | {"d/20": "e", "x.png": "d/0/1.png"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    place = tar_with_links(tmp_path / "set.tar", {"d/e/1.png": picture(1)}, links)
    places = Tree.open(place).places
    assert {path: places[path].missing for path in places} == {
        path: place.missing for path, place in Tree.open(str(root)).places.items()
    }
    assert places["x.png"].missing
    assert not places["d/17/1.png"].missing


@pytest.mark.parametrize("target", [".", "..", "../a"])
def test_a_link_to_its_own_folder_adds_nothing(target: str, tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"a/1.png": picture(1)})
    (root / "a" / "loop").symlink_to(target)
    place = tar_with_links(tmp_path / "set.tar", {"a/1.png": picture(1)}, {"a/loop": target})
    assert Tree.open(str(root)).images == Tree.open(place).images == ["a/1.png"]


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_links_that_multiply_a_source_are_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty folders, each with three links to the next: 3 to the power of 20 paths."""
    monkeypatch.setattr(archives_and_folders, "_MOST_FREE", 1_000)
    links = {f"{n}/link{k}": f"../{n + 1}" for n in range(20) for k in range(3)}
    contents = {f"{n}/1.png": picture(1) for n in range(21)}
    if form == "folder":
        root = write(tmp_path / "set", contents)
        for name, target in links.items():
            (root / name).symlink_to(target)
    place = str(root) if form == "folder" else tar_with_links(tmp_path / "set.tar", contents, links)
    with pytest.raises(UsageError, match="repeat the same files too often"):
        Tree.open(place)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_label_that_is_a_link_is_read_through_it(kind: bytes, tmp_path: Path) -> None:
    contents = {"0.png": picture(0), "0.cls": b"7", "1.png": picture(1)}
    place = tar_with_links(tmp_path / "set-0.tar", contents, {"1.cls": "0.cls"}, kind)
    assert by_colour(open_source(place)) == {(n, 0, 0): ("train", "7") for n in range(2)}


@pytest.mark.parametrize("target", ["gone.cls", "/etc/passwd"])
def test_a_label_that_is_a_link_to_nothing_is_named(target: str, tmp_path: Path) -> None:
    contents = {"0.png": picture(0), "0.cls": b"7", "1.png": picture(1)}
    place = tar_with_links(tmp_path / "set-0.tar", contents, {"1.cls": target})
    with pytest.raises(UsageError, match=r"1\.(cls|png)"):
        open_source(place)


def test_a_link_in_an_indexed_shard_is_broken(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    contents = {"0.png": png(32, 32), "0.cls": b"0"}
    tar_with_links(tmp_path / "set" / "0.tar", contents, {"1.png": "0.png", "1.cls": "0.cls"})
    section = PackSection(source=f"{tmp_path}/set", index_only=True)
    with pytest.raises(UsageError, match=r"0/1\.png: a link"):
        pack(f"{tmp_path}/set", section)
    collection = pack(f"{tmp_path}/set", section.model_copy(update={"max_broken": 1}))
    assert verify_collection(collection.url).size("train") == 1


def test_verify_survives_a_link_in_a_shard(copied: Path) -> None:
    shard = sorted(copied.glob("*.tar"))[0]
    tar_with_links(shard, {"0.png": picture(1)}, {"0.cls": "gone"})
    with pytest.raises(CorruptError, match="is damaged"):
        verify_collection(str(copied))


@pytest.mark.parametrize("name", ["pipe.png", "pipe.cls", "pipe"])
def test_a_pipe_is_listed_and_not_opened(name: str, tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"a/1.png": picture(1)})
    os.mkfifo(root / "a" / name)
    source = open_source(str(root))
    assert source.keys == ["a/1.png"]
    assert source.left_out == {("not a regular file", Path(name).suffix): (1, f"a/{name}")}


# --- slashes in keys -------------------------------------------------------------------------------------------------

SLASHES = {"/cat/1.png": "cat", "dog//2.png": "dog", "//dog/3.png": "dog"}


class _AnyKey(BaseHTTPRequestHandler):
    """The part of S3 that a reader uses, for any key, as AWS has it: rclone, our own server, refuses empty names."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = url.path.removeprefix("/").partition("/")
        query, status = parse_qs(url.query), 200
        if "list-type" in query:
            data = self._listing(bucket, query.get("prefix", [""])[0])
        elif (body := self.objects.get(unquote(key))) is None:
            status, data = 404, b"<Error><Code>NoSuchKey</Code></Error>"
        else:
            data = body
        if first := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            stop = int(first[2]) + 1 if first[2] else len(data)
            status, data = 206, data[int(first[1]) : stop]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def _listing(self, bucket: str, prefix: str) -> bytes:
        found = "".join(
            f"<Contents><Key>{quote(key)}</Key><Size>{len(data)}</Size><ETag>e</ETag>"
            "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for key, data in self.objects.items()
            if key.startswith(prefix)
        )
        root = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><EncodingType>url</EncodingType>'
        return f"{root}<Name>{bucket}</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=["memory", "s3"])
def slashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of a bucket with empty names of folders in its keys, as in s3://bucket/set//cat/1.png."""
    contents = {f"set/{key}": picture(int(key[-5])) for key in SLASHES}
    if request.param == "memory":
        for key, data in contents.items():
            files.write_bytes(f"memory://slashes/{key}", data)
        yield "memory://slashes/set"
        return
    _AnyKey.objects.update(contents)
    with ThreadingHTTPServer(("127.0.0.1", 0), _AnyKey) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        yield "s3://slashes/set"
        server.shutdown()
        thread.join()


def test_slashes_in_keys_of_a_bucket(slashes: str, tmp_path: Path) -> None:
    expected = {(int(key[-5]), 0, 0): ("train", name) for key, name in SLASHES.items()}
    assert by_colour(open_source(slashes)) == expected
    assert pack(f"{tmp_path}/out", PackSection(source=slashes, resolution=32)).size("train") == 3
