"""A folder served on loopback as a web server serves it, and as the Hugging Face Hub serves a data set, `owner/name`."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REVISIONS = ("main", "v1")


class Served(ThreadingHTTPServer):
    """`/NAME` are the files; `/api/datasets/..` and `/datasets/..` are the Hub's."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.knows_ranges = True
        self.tokens = set[str]()
        """What clients said in the header `Authorization`."""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients stop reading where they have what they want."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Served

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization") or "")
        path = unquote(urlsplit(self.path).path)
        revision = f"({'|'.join(REVISIONS)})"
        if re.fullmatch(f"/api/datasets/owner/name(/revision/{revision})?", path):
            self._answer(200, json.dumps({"id": "owner/name", "sha": "0" * 40}).encode())
        elif tree := re.fullmatch(f"/api/datasets/owner/name/tree/{revision}/?(.*)", path):
            self._tree(tree[2], recursive="recursive=true" in self.path)
        else:
            file = re.fullmatch(f"/datasets/owner/name/resolve/{revision}/(.*)", path)
            self._file(self.server.folder / (file[2] if file else path.strip("/")))

    def _tree(self, below: str, recursive: bool) -> None:
        folder = self.server.folder / below
        if not folder.is_dir():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        found = sorted(folder.rglob("*") if recursive else folder.iterdir())
        entries = [
            {"type": "file", "path": str(path.relative_to(self.server.folder)), "size": path.stat().st_size, "oid": "0"}
            if path.is_file()
            else {"type": "directory", "path": str(path.relative_to(self.server.folder)), "oid": "0"}
            for path in found
        ]
        self._answer(200, json.dumps(entries).encode())

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"} if self.path.startswith("/api/") else None)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or not self.server.knows_ranges:
            self._answer(200, data)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self._answer(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *words: object) -> None:  # noqa: A002 - its name in the class above
        """Nothing."""
