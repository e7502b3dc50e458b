"""A report's files as a browser would find them."""

import html.parser
import json
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Page(html.parser.HTMLParser):
    """What a browser would find in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.elements: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.words: list[str] = []
        self.data: Any = None
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements[tag].append({name: value or "" for name, value in attributes})
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["script"]:
            self.data = json.loads(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def pages(folder: Path) -> list[Page]:
    return [Page(path) for path in sorted(folder.rglob("*.html"))]


def check_links(written: Path) -> None:
    """Every link of a report leads to a file of the report."""
    for page in pages(written):
        held = [element for elements in page.elements.values() for element in elements]
        links = [element[name] for element in held for name in ("href", "src", "action") if name in element]
        assert len(links) > 8
        for link in links:
            parts = urlsplit(link)
            assert not parts.scheme, link
            assert not parts.netloc, link
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            assert target.is_file(), f"{page.path}: {link}"
            assert target.is_relative_to(written)
