"""Which stores an address may lead to, how each is reached, and what an address must not hold.

    s3://BUCKET/PATH                          pyarrow's client for S3; AWS_* of the environment, a profile, the machine's role
    gs://BUCKET/PATH                          pyarrow's client for Google Cloud Storage; its usual credentials
    hf://datasets/OWNER/NAME[@REVISION]/PATH  a data set on the Hugging Face Hub, to read; HF_TOKEN or `hf auth login`
    https://HOST/PATH, http://                one file of a web server, to read (`saecore.web`)
    others                                    what pyarrow knows (hdfs://, abfs://)

An address is written down in many places: run.json, the plan, the table of images, logs, pages. So an address that holds a
credential is refused, in a sentence that does not repeat it.
"""

import atexit
import functools
import os
import re
import time
import weakref
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.fs

from saecore import web

S3_ATTEMPTS = 3
"""How often pyarrow's client asks S3 for one thing, within a second or two, before `saecore.patience` takes over."""

S3_SECONDS = 10.0
"""Without a byte of an answer for so long, S3 is asked again. pyarrow's own 3 s are little for a busy server of one's own."""

S3_CONNECT_SECONDS = 5.0

GS_SECONDS = 20
"""For how long Google's client asks for one thing again and again; it would do so for 15 minutes."""

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN")
"""Variables of the environment whose values are never shown."""

_WEB, _HUB = ("http", "https"), "hf"

_SETTINGS = {
    *("endpoint_override", "scheme", "region", "force_virtual_addressing", "allow_bucket_creation", "tls_ca_file_path"),
    *("location", "project_id", "retry_limit_seconds", "replication", "user"),
}
"""Settings of an address that hold no secret. Others are not known to hold none."""

_FLAGS = {"force_virtual_addressing", "allow_bucket_creation"}
"""Settings that are true or false."""

# s3://bucket/path?endpoint_override=host:9000&scheme=http has settings; a bare `?` is a wildcard or part of a name.
ADDRESS = re.compile(r"(?P<root>\w+://[^/?]*)(?P<path>/.*?)?(?P<settings>\?[\w.%-]+=.*)?", re.DOTALL)

CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_PROFILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "HF_TOKEN",
)
"""Variables of the environment by which the clients of stores find their credentials."""

_HOW = (
    f"give it by the environment ({', '.join(CREDENTIALS)}) or by the machine's role, and name the address without it"
)


def check_holds_no_secret(uri: str) -> None:
    """ValueError, which does not repeat the address, if it holds a key, a token or a signature, or may hold one."""
    address = ADDRESS.fullmatch(uri)
    scheme, _, holder = (address["root"] if address else "").partition("://")
    if address is None or scheme == "file":
        return
    user, at, _ = holder.rpartition("@")
    is_open = scheme in ("gs", "gcs") and user == "anonymous"  # Google's name for nobody
    if at and not is_open and (":" in user or scheme in ("s3", "gs", "gcs", _HUB, *_WEB)):
        raise ValueError(f"an address holds a credential, which would be written into the run: {_HOW}")
    if scheme in _WEB:
        if set("?#") & set(uri):
            raise ValueError(
                f"an address of {scheme}:// goes on after the name of its file (`?` or `#`), and what stands there may "
                "be a token or a signature, which would be written into the run: name an address without it, or copy the file "
                "to a store that takes credentials from the environment (s3://, gs://, hf://datasets/)"
            )
        return
    settings = settings_of(address["settings"] or "")
    if any(name not in _SETTINGS or "@" in value for name, value in settings.items()):
        raise ValueError(
            "an address has a setting that may be a credential, which would be written into the run (endpoint_override, scheme "
            f"and region are settings that are known to be none): {_HOW}"
        )


def settings_of(text: str) -> dict[str, str]:
    """`?name=value&..` as a dictionary."""
    return dict(parse_qsl(text.removeprefix("?"), keep_blank_values=True))


def without_secrets(text: str) -> str:
    """A text of a library without what stands in its addresses before `@` or after `?`, and without `SECRETS`."""
    text = re.sub(r"(\w+://)[^/\s'\"@]+@", r"\1..@", text)
    text = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\")]+", r"\1?..", text)
    for name in SECRETS:
        if len(secret := os.environ.get(name, "")) >= 8:  # shorter ones are words
            text = text.replace(secret, "..")
    return text


def connect(root: str, path: str, settings: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem of `scheme://holder`, and the path inside it; ValueError for what is no place."""
    scheme, _, holder = root.partition("://")
    if scheme == "s3":
        return _s3(holder, settings_of(settings)), holder + path
    if scheme in _WEB:
        return reading(web.Files()), root + path
    if scheme == _HUB:
        return _hub(holder, path)
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in settings:
        settings = f"{settings}&retry_limit_seconds={GS_SECONDS}" if settings else f"?retry_limit_seconds={GS_SECONDS}"
    filesystem, inside = pyarrow.fs.FileSystem.from_uri(root + settings)
    return filesystem, inside + path


def _s3(bucket: str, settings: dict[str, str]) -> pyarrow.fs.S3FileSystem:
    """As `pyarrow.fs.FileSystem.from_uri` makes it, but for time-outs, and for small files that are written by one request."""
    given: dict[str, Any] = {
        name: value.lower() in ("true", "1") if name in _FLAGS else value for name, value in settings.items()
    }
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if named and "endpoint_override" not in given:
        scheme, _, given["endpoint_override"] = named.rstrip("/").rpartition("://")
        given.setdefault("scheme", scheme or "https")
    if not {"endpoint_override", "region"} & given.keys():
        given["region"] = pyarrow.fs.resolve_s3_region(bucket)
    return pyarrow.fs.S3FileSystem(
        **given,
        connect_timeout=S3_CONNECT_SECONDS,
        request_timeout=S3_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        allow_delayed_open=True,
    )


def _hub(kind: str, path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if kind != "datasets" or path.count("/") < 2:
        raise ValueError("files on the Hugging Face Hub are read from a data set: hf://datasets/OWNER/NAME/PATH")
    from huggingface_hub import HfFileSystem

    return reading(HfFileSystem()), kind + path


def reading(files: Any) -> pyarrow.fs.PyFileSystem:
    """A filesystem in fsspec's form as pyarrow's, to read."""
    return pyarrow.fs.PyFileSystem(_Reading(files))


RELEASE_SECONDS = 1.0
"""For so long the end of a program waits for files that are still open."""


@functools.cache
def _open_files() -> "weakref.WeakValueDictionary[int, Any]":
    """Files of Python's that Arrow holds, by identity: to fsspec, two files of one path are equal.

    Arrow's threads let go of them some time after a scan has answered. If Python ends just then, the process aborts (14 of 240
    times in a trial with a scan at its end), so Python's end waits for them.
    """
    files: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def wait() -> None:
        deadline = time.monotonic() + RELEASE_SECONDS
        while len(files) and time.monotonic() < deadline:
            time.sleep(0.005)

    atexit.register(wait)
    return files


class _Reading(pyarrow.fs.FSSpecHandler):
    """pyarrow's handler asks `isfile` and `isdir`, which take every failure for a file that is not there.

    A store that fails for a moment would look empty. This handler asks for what it needs.
    """

    def open_input_file(self, path: str) -> pa.NativeFile:
        file = self.fs.open(path, mode="rb")
        _open_files()[id(file)] = file
        return pa.PythonFile(file, mode="r")

    open_input_stream = open_input_file

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> list[pyarrow.fs.FileInfo]:
        (base,) = self.get_file_info([selector.base_dir])
        if base.type == pyarrow.fs.FileType.NotFound:
            if selector.allow_not_found:
                return []
            raise FileNotFoundError(selector.base_dir)
        found = self.fs.find(selector.base_dir, maxdepth=None if selector.recursive else 1, withdirs=True, detail=True)
        return [self._create_file_info(path, info) for path, info in found.items() if path != base.path.rstrip("/")]

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError("files there can be read only")

    def delete_file(self, path: str) -> None:
        raise OSError("files there can be read only")
