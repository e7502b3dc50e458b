import ast
import errno
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from saecore import storage
from tests.helpers.disks import fill

ROOT = Path(__file__).parents[1]


def test_a_path_is_local_and_absolute_and_an_address_is_taken_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    filesystem, path = storage.filesystem_of("a b/c%20d#?.tar")
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    assert path == str(tmp_path / "a b/c%20d#?.tar")
    assert storage.filesystem_of(f"file://{tmp_path}/x y")[1] == f"{tmp_path}/x y"
    # The in-memory filesystem of pyarrow stands for an object store.
    assert storage.filesystem_of("mock://bucket/a b/c%20d[1]?.tar")[1].endswith("a b/c%20d[1]?.tar")
    s3, path = storage.filesystem_of("s3://bucket/a b/c?.tar?endpoint_override=host:9000&scheme=http&region=eu-1")
    assert path == "bucket/a b/c?.tar"
    assert s3.region == "eu-1"


def test_join_uri_keeps_an_addresss_settings_at_the_end() -> None:
    assert storage.join_uri("/a/", "b", "c") == "/a/b/c"
    assert storage.join_uri("/", "b") == "/b"
    assert storage.join_uri("gs://bucket/", "b?") == "gs://bucket/b?"
    assert storage.join_uri("s3://bucket/a?region=eu-1", "b") == "s3://bucket/a/b?region=eu-1"


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file"
    storage.write_atomic(str(target), b"first")
    storage.write_atomic(str(target), pa.py_buffer(b"second"))
    assert target.read_bytes() == b"second"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_atomic(str(target), b"third")
    assert target.read_bytes() == b"second"
    assert [path.name for path in target.parent.iterdir()] == ["file"], "a temporary file stays behind"


def test_an_object_store_gets_one_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem_of", lambda uri: (store, uri.removeprefix("s3://")))
    storage.write_atomic("s3://file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("s3:/bucket/x", "s3://bucket/x"),
        ("s3:bucket/x", "s3://bucket/x"),
        ("gs:/bucket", "gs://bucket"),
        ("hf:/owner/name", "hf://owner/name"),
        ("file:/tmp/x", "file:///tmp/x"),
    ],
)
def test_an_address_that_lacks_a_slash_is_no_folder_of_that_name(written: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"write {meant}, or \./{written}"):
        storage.filesystem_of(written)
    for name in (meant, f"./{written}", f"/a/{written}", "c:/x", "a s3:/x"):
        storage.check_address(name)
    with pytest.raises(ValueError, match="nothing is named"):
        storage.check_address(" ")


def test_trying_a_place_leaves_nothing_behind(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "file").write_text("x")
    storage.check_writable(str(tmp_path / "a" / "b"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "disk"}
    (tmp_path / "held").mkdir()
    storage.check_writable(str(tmp_path / "held"))
    assert list((tmp_path / "held").iterdir()) == []
    for place, why in ((tmp_path / "file", "exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(ValueError, match=f"{place} cannot be written: .*{why}"):
            storage.check_writable(str(place))
    fill(small_disk)
    with pytest.raises(ValueError, match=f"{small_disk} cannot be written: No space left on device"):
        storage.check_writable(str(small_disk))


def test_a_write_that_fails_says_where_and_why_also_when_it_has_travelled(small_disk: Path) -> None:
    with pytest.raises(storage.WriteError) as told:
        storage.write_atomic(str(small_disk / "x"), bytes(32 << 20))
    assert str(told.value) == f"{small_disk / 'x'} cannot be written: No space left on device"
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)
    assert list(small_disk.iterdir()) == []


def test_storage_is_the_only_file_that_asks_a_filesystem() -> None:
    """A test that puts another store in the place of the disk patches one name. `stores.py` makes what is asked."""
    asks = re.compile(r"filesystem_of|FileSystem\b|FileSelector|get_file_info|open_input_|open_output_")
    root = Path(storage.__file__).parents[1]
    files = [file for folder in ("saecore", "jobs", "benchmarks") for file in (root / folder).rglob("*.py")]
    assert {file.name for file in files if asks.search(file.read_text())} == {"storage.py", "stores.py"}


def test_what_a_place_holds(store: Path) -> None:
    (store / "run" / "images").mkdir(parents=True)
    (store / "run" / "run.json").write_text('{"a": [1]}')
    pq.write_table(pa.table({"a": [1, 2], "b": [3, 4]}), store / "run" / "images" / "x.parquet")
    assert storage.names_in("s3://bucket/run") == {"run.json", "images"}
    assert storage.names_in("s3://bucket/none") == set()
    for name, kinds in (("run.json", (True, True, False)), ("images", (True, False, True)), ("none", (False,) * 3)):
        uri = storage.join_uri("s3://bucket/run", name)
        assert (storage.exists(uri), storage.is_file(uri), storage.is_folder(uri)) == kinds
    assert storage.read_json("s3://bucket/run/run.json") == {"a": [1]}
    assert storage.read_parquet("s3://bucket/run/images/x.parquet", ["b"]).to_pydict() == {"b": [3, 4]}
    place = storage.Place("s3://bucket/run")
    assert {info.base_name for info in place.entries(below=True)} == {"run.json", "images", "x.parquet"}
    assert place.dataset([f"{place.path}/images/x.parquet"]).to_table()["a"].to_pylist() == [1, 2]
    with place.open(f"{place.path}/run.json") as file:
        file.seek(2)
        assert file.read(1) == b"a"
    place.remove(f"{place.path}/run.json")
    assert storage.names_in("s3://bucket/run") == {"images"}
    assert not place.is_local


def test_a_table_on_a_store_is_read_by_one_thread(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pq.read_table` reads by threads, which abort a process that ends while they hold what Python read."""
    table = pa.table({"a": [1, 2], "b": [["x"], []]})
    pq.write_table(table, store / "x.parquet")
    monkeypatch.setattr(pq, "read_table", lambda *_, **__: pytest.fail("threads read"))
    assert storage.read_parquet("s3://bucket/x.parquet").equals(table)
    assert storage.read_parquet("s3://bucket/x.parquet", ["b"]).equals(table.select(["b"]))


def test_no_filter_of_a_data_set_shares_memory_with_numpy() -> None:
    """On a busy machine 3 of 28 `evaluate --masks` with a wrong name were aborted for it. `of_images` copies."""
    made = {
        path.relative_to(ROOT).as_posix()
        for folder in ("saecore", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "isin" and ast.unparse(node.value) != "np"
    }
    assert made == {"saecore/runs/files.py"}


def test_the_end_of_python_waits_for_files_that_a_thread_of_arrow_still_holds(tmp_path: Path) -> None:
    """A thread that lets go of a file of Python's while Python ends aborts the process. A daemon thread stands for Arrow's."""
    (tmp_path / "a").write_bytes(b"some bytes")
    script = textwrap.dedent(f"""
        import threading, time
        import fsspec
        from saecore import stores

        held = [stores.reading(fsspec.filesystem("file")).open_input_file({str(tmp_path / "a")!r})]

        def let_go():
            time.sleep(0.3)
            print("let go", flush=True)  # before, since Python may end at once after it
            held.clear()

        threading.Thread(target=let_go, daemon=True).start()
    """)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "let go\n", "")
