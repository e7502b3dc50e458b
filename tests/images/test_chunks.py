import gzip
import io
import itertools
import os
import random
import re
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from saecore import schema, storage
from saecore.images.chunks import plan_chunks, read_chunk
from saecore.images.listing import list_shards
from saecore.storage import ReadError

Members = Sequence[tuple[str, bytes]]
GENERATOR = np.random.default_rng(5)
PICTURES = [(f"{index:04d}.jpg", GENERATOR.bytes(700 + 97 * index)) for index in range(23)]


def write_tar(path: Path, members: Members, form: int = tarfile.GNU_FORMAT, **options: Any) -> Path:
    packed = path.suffix in (".gz", ".tgz")
    opened = tarfile.open(path, "w:gz" if packed else "w", format=form, **options)  # noqa: SIM115
    with opened as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(plan: pa.Table, batch_bytes: int = 4_000) -> list[dict[str, Any]]:
    """All rows of a plan; holds on the way what is promised of every chunk."""
    rows = []
    for chunk in plan.to_pylist():
        found = []
        for table in read_chunk(chunk, batch_bytes):
            assert table.schema.equals(schema.RAW)
            table.validate(full=True)
            found += table.to_pylist()
        ids = [row["image_id"] for row in found]
        assert ids == [chunk["shard_id"] << 32 | index for index in range(chunk["start"], chunk["end"])]
        assert all((row["data"] is None) == (row["error"] is not None) == bool(row["error_detail"]) for row in found)
        rows += found
    return rows


@pytest.mark.parametrize("kind", ["a.tar", "a.tar.gz", "a.parquet", "folder"])
def test_some_images_of_a_chunk(tmp_path: Path, kind: str) -> None:
    """Those asked for, as they are among all; a local tar is not read through for one of them."""
    path, members = tmp_path / kind, [(name, GENERATOR.bytes(50_000)) for name, _ in PICTURES]
    if kind == "folder":
        path.mkdir()
        for name, data in members:
            (path / name).write_bytes(data)
    elif kind == "a.parquet":
        pq.write_table(pa.table({"image": [data for _, data in members]}), path, row_group_size=5)
    else:
        write_tar(path, members)
    plan = plan_of(path, chunk_size=9)
    every = {row["image_id"]: row for row in read(plan)}
    for chunk in plan.to_pylist():
        for indices in ({chunk["start"]}, {chunk["end"] - 1}, set(range(chunk["start"], chunk["end"], 3)), set()):
            found = [row for table in read_chunk(chunk, indices=indices) for row in table.to_pylist()]
            assert found == [every[index] for index in sorted(indices)]
    if kind == "a.tar":
        before = bytes_read()
        list(read_chunk(plan.to_pylist()[0], indices={4}))
        assert 50_000 < bytes_read() - before < 150_000


def bytes_read() -> int:
    """What this process has read from files so far."""
    with open("/proc/self/io") as counts:
        return int(counts.readline().split()[1])


def contents(rows: list[dict[str, Any]]) -> list[tuple[str, bytes]]:
    return [(row["key"], row["data"]) for row in rows]


def outcome(path: Path, chunk_size: int = 4) -> list[tuple[str, str | None]]:
    plan = plan_chunks(list_shards([str(path)]), chunk_size)
    assert plan.schema.equals(schema.PLAN)
    rows = read(plan)
    for chunk in plan.to_pylist():  # what is damaged is so too for whoever asks for some of the images
        of_chunk = [row for row in rows if chunk["start"] <= row["image_id"] < chunk["end"]]
        some = read_chunk(chunk, indices=range(chunk["end"] - 1, chunk["start"] - 1, -2))
        assert [row for table in some for row in table.to_pylist()] == of_chunk[::-2][::-1]
    return [(row["key"], row["error"]) for row in rows]


def plan_of(*paths: Path | str, chunk_size: int = 4, **options: Any) -> pa.Table:
    return plan_chunks(list_shards([str(path) for path in paths]), chunk_size, **options)


# ---- Listing.


def test_the_listing_depends_on_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.tar", "a/1.tar", "a/1.tar.gz", "c.PARQUET", "p/x.jpg", "p/q/y.PNG", "p/note.txt", "p/._x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "z.jpg").write_bytes(b"z")
    found = list_shards([str(tmp_path)])
    assert [(Path(shard.uri).name, shard.kind, shard.members) for shard in found] == [
        (tmp_path.name, "folder", ["p/q/y.PNG", "p/x.jpg"]),
        ("1.tar", "tar", None),
        ("1.tar.gz", "tar.gz", None),
        ("2.tar", "tar", None),
        ("c.PARQUET", "parquet", None),
    ]
    assert found[1].bytes == len("a/1.tar")
    assert found[1].mtime_ns == (tmp_path / "a/1.tar").stat().st_mtime_ns
    paths = ["a", "a/1.tar", "*/2.tar", "./c.PARQUET", "p", "p/q", str(tmp_path), f"file://{tmp_path}/a"]
    monkeypatch.chdir(tmp_path)
    listings = [list_shards(random.Random(seed).sample(paths, len(paths))) for seed in range(6)]
    assert all(listing == found for listing in listings)


def test_a_folders_images_are_grouped(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"{index}.jpg").write_bytes(bytes([index]))
    found = list_shards([str(tmp_path)], files_per_shard=4)
    assert [len(shard.members or []) for shard in found] == [4, 4, 2]
    rows = read(plan_chunks(found, chunk_size=3))
    assert contents(rows) == [(f"{index}.jpg", bytes([index])) for index in range(10)]
    assert [row["image_id"] >> 32 for row in rows] == [0] * 4 + [1] * 4 + [2] * 2
    assert contents(read(plan_of(tmp_path / "7.jpg"))) == [("7.jpg", b"\7")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["top.jpg"]),
        ("?o[op].jpg", ["top.jpg"]),
        ("one*", ["one/a.jpg", "one/two/b.jpg"]),
        ("*/*.jpg", ["one/a.jpg", "x[1]/c.jpg"]),
        ("**/b.*", ["one/two/b.jpg"]),
        ("**/*.jpg", ["one/a.jpg", "one/two/b.jpg", "top.jpg", "x[1]/c.jpg"]),
        ("one/**", ["a.jpg", "two/b.jpg"]),
        ("x[1]", ["c.jpg"]),
        ("x[1]/c.jpg", ["c.jpg"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("top.jpg", "one/a.jpg", "one/two/b.jpg", "x[1]/c.jpg", ".hidden/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"0")
    (found,) = list_shards([f"{tmp_path}/{pattern}"])
    assert found.members == expected


@pytest.mark.parametrize("path", ["none", "none/a.jpg", "none/*.tar", "empty", "note.txt", "bad://x/y"])
def test_a_path_without_images_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no image")
    address = path if "://" in path else f"{tmp_path}/{path}"
    with pytest.raises(ValueError, match=".*" + path.replace("*", r"\*")) as caught:
        list_shards([address])
    assert "\n" not in str(caught.value)
    assert "bad" in path or "no such file, or no images in it; looked for .tar" in str(caught.value)


def listed(*paths: Path | str) -> tuple[list[str], str]:
    """The files of folder shards, with the name of their folder, and what is said about links."""
    said: list[str] = []
    found = list_shards([str(path) for path in paths], say=said.append)
    assert list_shards([str(path) for path in reversed(paths)]) == found
    return sorted(f"{Path(shard.uri).name}/{name}" for shard in found for name in shard.members or []), "; ".join(said)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"0")


def test_links_in_circles_are_not_followed(tmp_path: Path) -> None:
    """To itself, to each other, to what holds them, before the name that they lead to: every image once, by its own name."""
    p, own = tmp_path / "p", ["p/0.jpg", "p/a/1.jpg", "p/b/2.jpg", "p/z/3.jpg"]
    make(tmp_path, *own, "6.jpg")
    assert listed(p) == (own, "")
    for link, target in {"self": ".", "a/other": "../b", "b/other": "../a", "a/first": "../z", "up": ".."}.items():
        (p / link).symlink_to(target)
    files, said = listed(p)
    assert files == own
    assert said.startswith(
        f"passed over links to folders that are listed already (5): {p}/a/first, {p}/a/other, {p}/b/other, .."
    )
    for paths in ([f"{p}/**/*.jpg"], [f"{p}/*"], [f"{p}/**"], [p, p / "self"], [p, p / "a"], [p, p / "0.jpg"], [p, p]):
        files, said = listed(*paths)
        assert files == own
        assert said
    expanded = [path for path in p.iterdir() if path.name != "up"]  # as a shell does with p/*
    assert {Path(name).name for name in listed(*expanded)[0]} == {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}
    assert len(listed(*expanded)[0]) == 4
    assert listed(p / "self")[0] == [name.replace("p/", "self/") for name in own]


def test_links_to_elsewhere_are_followed_once(tmp_path: Path) -> None:
    p = tmp_path / "p"
    make(tmp_path, "p/0.jpg", "else/4.jpg", "else/deep/5.jpg", "many/6.jpg")
    (p / "x").symlink_to(tmp_path / "else")
    assert listed(p) == (["p/0.jpg", "p/x/4.jpg", "p/x/deep/5.jpg"], "")
    (p / "y").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "back").symlink_to(p)
    (tmp_path / "else" / "on").symlink_to(tmp_path / "many")
    files, said = listed(p)
    assert files == ["p/0.jpg", "p/x/4.jpg", "p/x/deep/5.jpg", "p/x/on/6.jpg"]
    assert said == f"passed over links to folders that are listed already (2): {p}/x/back, {p}/y"
    assert listed(p, tmp_path / "else")[0] == ["else/4.jpg", "else/deep/5.jpg", "else/on/6.jpg", "p/0.jpg"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "self").symlink_to(".")
    with pytest.raises(ValueError, match="no images in it"):
        listed(tmp_path / "empty")


def test_links_that_lead_nowhere_are_said(tmp_path: Path) -> None:
    make(tmp_path, "p/1.jpg")
    (tmp_path / "p" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "p" / "me.jpg").symlink_to("me.jpg")
    (tmp_path / "p" / "again.jpg").symlink_to("1.jpg")  # another name of a file is another image
    files, said = listed(tmp_path / "p")
    assert files == ["p/1.jpg", "p/again.jpg"]
    assert said == f"passed over dead links (2): {tmp_path}/p/gone.jpg, {tmp_path}/p/me.jpg"


# ---- Tar.


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_chunks_hold_what_was_written(tmp_path: Path, suffix: str, form: int) -> None:
    long = "folder/" * (13 if form == tarfile.USTAR_FORMAT else 40)
    name = "é.JPG" if form == tarfile.USTAR_FORMAT else "ü€.JPG"
    pictures = [*PICTURES, (long + "x.y.webp", b"long"), (name, b"name"), ("0000.jpg", b"again"), ("/../up.png", b"up")]
    members = [
        ("a/", b""),
        ("0.json", b"{}"),
        *pictures[:9],
        ("1.txt", b"x" * 9000),
        *pictures[9:],
        ("._0.jpg", b"mac"),
    ]
    options = {"pax_headers": {"comment": "global " * 300}} if form == tarfile.PAX_FORMAT else {}
    path = write_tar(tmp_path / f"shard{suffix}", members, form, **options)
    for chunk_size in (1, 4, 1000):
        plan = plan_of(path, chunk_size=chunk_size)
        assert plan["damage"].null_count == len(plan)
        assert plan["chunk_id"].to_pylist() == list(range(-(-len(pictures) // chunk_size)))
        assert contents(read(plan)) == list(pictures)
    # In parallel and in any order: the same rows.
    plan = plan_of(path, chunk_size=4)
    order = random.Random(1).sample(range(len(plan)), len(plan))
    with ThreadPoolExecutor(4) as pool:
        parts = dict(zip(order, pool.map(lambda number: read(plan.slice(number, 1)), order), strict=True))
    assert [row for number in sorted(parts) for row in parts[number]] == read(plan)


def test_a_chunk_comes_in_batches_of_bounded_size(tmp_path: Path) -> None:
    plan = plan_of(write_tar(tmp_path / "a.tar", PICTURES), chunk_size=100)
    tables = list(read_chunk(plan.to_pylist()[0], batch_bytes=5_000))
    assert len(tables) > 5
    assert all(table["data"].nbytes < 5_000 + 3_000 + 500 for table in tables)


def test_limit_and_ids_over_shards(tmp_path: Path) -> None:
    for name in "ba":
        write_tar(tmp_path / f"{name}.tar", PICTURES)
    rows = read(plan_of(tmp_path, limit=30))
    assert [row["image_id"] for row in rows] == [*range(23), *(1 << 32 | index for index in range(7))]
    assert rows == read(plan_of(tmp_path, limit=None))[:30]
    assert len(plan_of(tmp_path, limit=5)) == 2


def test_links_sparse_members_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        odd = tarfile.TarInfo("odd-NAME.jpg")
        odd.size = 3
        tar.addfile(odd, io.BytesIO(b"odd"))
    data = path.read_bytes()
    header = data[512:1024].replace(b"NAME", b"\xff\xfeMe")
    checksum = sum(header[:148]) + 8 * 32 + sum(header[156:])
    path.write_bytes(data[:512] + header[:148] + b"%06o\0 " % checksum + header[156:] + data[1024:])
    assert contents(read(plan_of(path))) == [(r"odd-\xff\xfeMe.jpg", b"odd")]


LAST = PICTURES[-1][0]
WHOLE = [(name, None) for name, _ in PICTURES]
LOST = ("", "damaged-shard")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: b"", [LOST]),
        (lambda data: b"<html>" * 1000, [LOST]),
        (lambda data: b"x", [LOST]),
        (lambda data: data[: data.index(PICTURES[9][1]) + 100], [*WHOLE[:9], (WHOLE[9][0], "truncated"), LOST]),
        (lambda data: data[: data.index(PICTURES[9][1]) - 512], [*WHOLE[:9], LOST]),  # cut between two members
        (lambda data: data[: data.index(PICTURES[9][1]) - 300], [*WHOLE[:9], LOST]),  # in a header
        (lambda data: data[: data.index(PICTURES[9][1])], [*WHOLE[:9], (WHOLE[9][0], "truncated"), LOST]),
        (lambda data: data.replace(PICTURES[9][0].encode(), b"broken"), [*WHOLE[:9], LOST]),
        (lambda data: data + data, [*WHOLE, LOST]),  # `cat a.tar b.tar`
        (lambda data: data.rstrip(b"\0") + bytes(2048), WHOLE),
    ],
)
def test_damaged_tars_keep_what_is_whole(
    tmp_path: Path, damage: Callable[[bytes], bytes], expected: list[tuple[str, str | None]]
) -> None:
    path = write_tar(tmp_path / "a.tar", PICTURES)
    path.write_bytes(damage(path.read_bytes()))
    for chunk_size in (1, 4, 9, 10, 100):
        assert outcome(path, chunk_size) == expected


def test_damaged_gzip(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", PICTURES)
    data = path.read_bytes()
    for cut in (1, 30, len(data) // 3, len(data) // 2, len(data) - 9):
        path.write_bytes(data[:cut])
        seen = outcome(path)
        errors = [error for _, error in seen]
        assert seen[-1] == LOST
        assert errors[:-1] in ([None] * (len(seen) - 1), [None] * (len(seen) - 2) + ["truncated"])
        assert [key for key, _ in seen[:-1]] == [name for name, _ in PICTURES[: len(seen) - 1]]
    path.write_bytes(gzip.decompress(data))  # unpacked on the way, still called .tar.gz
    assert outcome(path) == WHOLE
    (tmp_path / "b.tar").write_bytes(data)
    assert outcome(tmp_path / "b.tar") == WHOLE


def test_broken_bytes_in_a_tar_never_crash(tmp_path: Path) -> None:
    generator = random.Random(3)
    tars = [
        write_tar(tmp_path / f"{form}{suffix}", [*PICTURES[:4], ("l" * 300 + ".png", b"long"), *PICTURES[4:7]], form)
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        for suffix in (".tar", ".tar.gz")
    ]
    for number in range(300):
        source = tars[number % 4]
        data = bytearray(source.read_bytes())
        for _ in range(generator.choice([1, 3, 30])):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path = tmp_path / ("x" + "".join(source.suffixes))
        path.write_bytes(data)
        read(plan_of(path))


def test_a_huge_tar_never_sits_in_memory(tmp_path: Path) -> None:
    """A sparse file of 12 GB: one member too large for an image between small ones, and one that is no image."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for name, size in (("0.jpg", 10), ("huge.jpg", 6 << 30), ("video.mp4", 6 << 30), ("1.jpg", 10)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    tracemalloc.start()
    plan = plan_of(path, chunk_size=1)
    rows = read(plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row["key"], row["error"]) for row in rows] == [("0.jpg", None), ("huge.jpg", "too-large"), ("1.jpg", None)]
    assert plan["bytes"][0].as_py() > 12 << 30
    assert peak < 16 << 20


# ---- Parquet.


def test_parquet_columns_and_keys(tmp_path: Path) -> None:
    data = [data for _, data in PICTURES]
    tables = {
        "struct": pa.table({"image": [{"bytes": b, "path": f"p{i}"} for i, b in enumerate(data)], "thumb": data}),
        "plain": pa.table({"jpg": data, "__key__": [f"p{i}" for i in range(len(data))], "label": data}),
        "large": pa.table({"odd": pa.array(data, pa.large_binary()), "id": [f"p{i}" for i in range(len(data))]}),
        "none": pa.table({"bytes": data, "key": data}),
    }
    for name, table in tables.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, row_group_size=6)
        for chunk_size in (1, 4, 6, 7, 100):
            expected = [(str(i) if name == "none" else f"p{i}", b) for i, b in enumerate(data)]
            assert contents(read(plan_of(path, chunk_size=chunk_size))) == expected
    assert plan_of(tmp_path / "struct.parquet", image_column="thumb")["column"][0].as_py() == "thumb"
    with pytest.raises(ValueError, match="no such column"):
        plan_of(tmp_path / "struct.parquet", image_column="picture")
    pq.write_table(pa.table({"left": data, "right": data}), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="Name one of left, right"):
        plan_of(tmp_path / "two.parquet")


@pytest.mark.parametrize("form", ["large", "view", "dictionary", "fixed", "struct", "struct view", "struct dictionary"])
def test_parquet_columns_of_every_binary_kind(tmp_path: Path, form: str) -> None:
    """Each value as it was written, however Arrow holds it; of one length alone only where that column is asked for."""
    path, data = tmp_path / "a.parquet", [*(data[:700] for _, data in PICTURES), None]
    kinds = {
        "large": pa.large_binary(),
        "view": pa.binary_view(),
        "fixed": pa.binary(700),
        "struct view": pa.binary_view(),
    }
    values = pa.array(data, kinds.get(form, pa.binary()))
    values = values.dictionary_encode() if "dictionary" in form else values
    if "struct" in form:
        values = pa.StructArray.from_arrays([values, pa.array([f"p{i}" for i in range(len(data))])], ["bytes", "path"])
    rows = None if form == "struct view" else 7  # pyarrow does not write slices of these
    try:
        pq.write_table(pa.table({"picture": values, "label": range(len(data))}), path, row_group_size=rows)
    except pa.ArrowNotImplementedError:
        assert int(pa.__version__.split(".")[0]) < 26
        pytest.skip("this old pyarrow does not write such columns")
    if form == "fixed":
        with pytest.raises(ValueError, match="no column of it holds encoded images"):
            plan_of(path)
    plan = plan_of(path, image_column="picture" if form == "fixed" else None)
    expected = [(f"p{i}" if "struct" in form else str(i), value) for i, value in enumerate(data)]
    assert contents(read(plan)) == expected
    assert [row["error"] for row in read(plan)] == [None] * len(PICTURES) + ["no-data"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"url": ["x"], "n": [1]}, "there are: url (string), n (int64)"),
        ({"image": [[b"x"]]}, "there are: image (list<"),
        ({"image": [{"inner": {"bytes": b"x"}}]}, "there are: image (struct<inner: struct<bytes: binary>>)"),
        ({f"c{i}": [i] for i in range(30)}, "c19 (int64) and 10 more"),
    ],
)
def test_parquet_without_images_says_what_it_holds(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    for column in (None, next(iter(columns))):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            plan_of(path, image_column=column)
        assert "needed is binary, or a struct with a binary field named bytes" in str(caught.value)
        assert str(path) in str(caught.value)


def test_parquet_reads_only_the_row_groups_of_the_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    data = [GENERATOR.bytes(50_000) for _ in range(40)]
    pq.write_table(pa.table({"image": data}), path, row_group_size=4, compression="none")
    plan = plan_of(path, chunk_size=4)
    before = bytes_read()
    assert [row["data"] for row in read(plan.slice(7, 1))] == data[28:32]
    assert 4 * 50_000 < bytes_read() - before < 8 * 50_000


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    data = [GENERATOR.bytes(5_000) for _ in range(12)]
    values = [*data[:3], None, *data[4:]]
    pq.write_table(pa.table({"image": values}), path, row_group_size=4, compression="snappy", use_dictionary=False)
    whole = path.read_bytes()
    plan = plan_of(path, chunk_size=6)
    assert [row["error"] for row in read(plan)] == [None] * 3 + ["no-data"] + [None] * 8
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:start] + bytes(300) + whole[start + 300 :])
    rows = read(plan)
    assert [row["error"] for row in rows] == [None] * 3 + ["no-data"] + ["unreadable"] * 4 + [None] * 4
    assert rows[5]["key"] == "5"
    some = [
        table.to_pylist() for chunk in plan.to_pylist() for table in read_chunk(chunk, indices=[chunk["start"] + 5])
    ]
    assert some == [[rows[5]], [rows[11]]]
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for broken in (b"", whole[:5_000], b"x" * 5_000, whole[:footer] + b"\xff" * 32 + whole[footer + 32 :]):
        path.write_bytes(broken)
        assert outcome(path) == [LOST]
        assert {row["error"] for row in read(plan)} == {"damaged-shard"}  # it broke after the plan


# ---- What fails that is not the images' fault, and what changes.


def test_files_that_vanish_or_change_after_the_plan(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.jpg").write_bytes(b"data")
    plan = plan_of(folder)
    (folder / "2.jpg").unlink()
    assert [row["error"] for row in read(plan)] == [None, None, "missing-file", None]

    tar = write_tar(folder / "a.tar", PICTURES)
    plan = plan_of(tar)
    write_tar(tar, PICTURES[:3])
    rows = read(plan)
    assert [row["error"] for row in rows] == [None] * 3 + ["damaged-shard"] * 20
    tar.unlink()
    assert {row["error"] for row in read(plan)} == {"damaged-shard"}
    shard = list_shards([str(write_tar(folder / "b.tar", PICTURES))])
    (folder / "b.tar").unlink()
    gone = plan_chunks(shard, 4)
    assert "cannot be opened" in gone["damage"][0].as_py()
    assert [row["error"] for row in read(gone)] == ["damaged-shard"]

    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()  # as a disk that is not mounted: nothing is written about images
    with pytest.raises(ReadError, match="nor its folder"):
        read(plan)


class FlakyFile:
    """A file whose reading fails after so many reads."""

    def __init__(self, file: pa.NativeFile, left: int) -> None:
        self.file, self.left = file, left
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return self.file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".parquet", ".jpg"])
def test_storage_that_fails_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"image": [GENERATOR.bytes(100_000) for _ in range(30)]}), path, row_group_size=10)
    elif suffix == ".jpg":
        path.write_bytes(b"data")
    else:
        write_tar(path, [(name, GENERATOR.bytes(100_000)) for name, _ in PICTURES])
    plan = plan_of(path, chunk_size=100)

    class FlakyFileSystem:
        def __init__(self, left: int) -> None:
            self.left = left

        def open_input_file(self, inside: str) -> pa.PythonFile:
            return pa.PythonFile(FlakyFile(pa.OSFile(inside), self.left), mode="r")

    for left in itertools.count():
        flaky = FlakyFileSystem(left)
        monkeypatch.setattr(storage, "filesystem_of", lambda uri, flaky=flaky: (flaky, uri))
        try:
            rows = read(plan)
        except OSError as error:
            assert "Input/output error" in str(error)  # noqa: PT017
            continue
        break
    assert left > 0
    assert all(row["error"] is None for row in rows)


def test_any_pyarrow_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows from an object store: here a tree that is reached by addresses only."""
    write_tar(tmp_path / "b 1#%20.tar", PICTURES)
    write_tar(tmp_path / "c.tar.gz", PICTURES)
    pq.write_table(pa.table({"image": [data for _, data in PICTURES]}), tmp_path / "d.parquet")
    (tmp_path / "photos" / "x").mkdir(parents=True)
    (tmp_path / "photos" / "x" / "1 ?.jpg").write_bytes(b"one")
    expected = read(plan_of(tmp_path))

    def store(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        assert uri.startswith("s3://bucket"), uri
        filesystem = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
        return filesystem, uri.removeprefix("s3://bucket").strip("/")

    monkeypatch.setattr(storage, "filesystem_of", store)
    for paths in (["s3://bucket"], ["s3://bucket/"], ["s3://bucket/*.tar*", "s3://bucket/d.*", "s3://bucket/**/*.jpg"]):
        found = list_shards(paths)
        assert [shard.kind for shard in found] == ["folder", "tar", "tar.gz", "parquet"]
        rows = read(plan_chunks(found, 5))
        assert [row | {"uri": ""} for row in rows] == [row | {"uri": ""} for row in expected]
        assert {row["uri"] for row in rows if "tar" in row["uri"]} == {
            "s3://bucket/b 1#%20.tar",
            "s3://bucket/c.tar.gz",
        }
