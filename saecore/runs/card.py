"""README.md of a run: a dataset card, with which Hugging Face `datasets` and the Hub read the run's tables as they are.

    datasets.load_dataset("runs/photos", "maps")     # without a name: images

Its front matter names the tables that are there, each by a glob; its text says what made them, and how a map is decoded. It is
made to be published: models that lie on a disk appear by the last part of their path alone, and the command and the inputs,
which run.json has, do not appear. Whoever removes the line `MARK` keeps what they wrote: the card is then left alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


from saecore.storage import is_file, join_uri, read_bytes, split_settings, write_atomic

NAME = "README.md"

MARK = "<!-- Relevance Map SAE writes this card again when tables are added. Remove this line to keep it as it is. -->"

TABLES = {
    "images": ("images/*.parquet", "a row for every image that was found, refused ones too"),
    "activations": ("activations/*.parquet", "the latents that were kept of each image, strongest first"),
    "maps": ("maps/*.parquet", "relevance maps: one signed number for each patch of the image"),
    "latents": ("latents.parquet", "a row for every latent: what it does, what it is called"),
    "by_latent": ("by_latent/*.parquet", "`activations`, sorted by latent and by falling activation"),
    "top_images": ("top_images/*.parquet", "of the strongest images of each latent all that showing them takes"),
}
"""The glob of each table below the run, and what it holds. The first that a run has is what `load_dataset` takes by default."""

PUBLISHING = """## Before it is published

This card holds no paths. Other files do: `run.json`, `run.log`, `plan.parquet`, the column `uri` of `images` and `top_images`,
and the metadata of Parquet files say where images and models lay on the machine that made them; `report/` shows the images
themselves. The licence is that of the images, and yours to state: `license:` at the top of this card.

```bash
hf upload OWNER/NAME FOLDER . --repo-type dataset
```"""


def write(uri: str, record: Mapping[str, Any]) -> None:
    """Write the card of the run at `uri`, as run.json and the files there have it; not over one that is somebody's own."""
    before = _read(uri, NAME)
    if before is not None and MARK not in before.decode(errors="replace"):
        return
    said = text(split_settings(uri)[0].rstrip("/").rpartition("/")[2], record, tables(uri, record)).encode()
    if said != before:
        write_atomic(join_uri(uri, NAME), said)


def tables(uri: str, record: Mapping[str, Any]) -> list[str]:
    """Those of `TABLES` that have files. A glob without files would make `load_dataset` fail for that table."""
    found = {name for name, rows in record["rows"].items() if rows}
    if is_file(join_uri(uri, "latents.parquet")):
        found.add("latents")
    index = json.loads(_read(uri, "by_latent/_index.json") or "{}")
    folders = {"rows": "by_latent", "top": "top_images"}
    found |= {folders[kind] for segment in index.get("segments", []) for kind in folders if segment[kind]}
    return [name for name in TABLES if name in found]


def text(name: str, record: Mapping[str, Any], held: Sequence[str]) -> str:
    """The card of a run of that name with these tables."""
    facts = [f"- {words}: {said}" for words, said in _facts(record).items() if said]
    listed = [f"- {_code(table)}: {TABLES[table][1]}{_rows(record, table)}" for table in held]
    parts = [
        _front_matter(held),
        MARK,
        f"# {_code(name)}",
        f"What {_what(record)}, made by Relevance Map SAE.",
        "\n".join(facts),
        f"## Tables\n\n{chr(10).join(listed)}",
        f"```python\n{_example(record, held)}```",
        PUBLISHING,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(held: Sequence[str]) -> str:
    lines = ["---", "tags:", "- clip", "- sparse-autoencoder", "- interpretability", "configs:"]
    for place, table in enumerate(held):
        lines += [f"- config_name: {table}", f"  data_files: {TABLES[table][0]}", *["  default: true"][place:]]
    return "\n".join([*lines, "---"])


def _what(record: Mapping[str, Any]) -> str:
    if record["parts"].get("kind", "explain") == "embed":
        return "CLIP makes of a collection of images: embeddings"
    return "a CLIP and a sparse autoencoder see in a collection of images, and where"


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """What made the run, and how much there is; nothing for what its record does not say."""
    config, made = record.get("config", {}), record["parts"]
    refused = sum(record["refused"].values())
    grid = record.get("grid")
    return {
        "images": f"{record['images']:,}" + (f", of which {refused:,} were refused" if refused else ""),
        "CLIP": _model(config.get("clip"), made.get("clip")),
        "SAE": _model(config.get("sae"), made.get("sae"))
        + (f", {record['n_latents']:,} latents" if "sae" in config else ""),
        "maps": ", ".join(
            [*map(_code, config.get("methods", [])), *([f"{grid[0]} x {grid[1]} patches"] if grid else [])]
        ),
        "of": ", ".join(map(_code, made.get("targets", []))),
        "latents kept of each image": f"{made['k']}" if "k" in made else "",
        "worst error of map + remainder": f"{record['worst_completeness_error']:.1e}"
        if "worst_completeness_error" in record
        else "",
        "made": record.get("started", "")[:10],
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
    }


def _model(address: str | None, digest: str | None) -> str:
    """A model by its id on the Hub, or by the last part of its path: where it lies is nobody's business."""
    if address is None:
        return ""
    local = address.startswith("/") or ("://" in address and not address.startswith("hf://"))
    shown = split_settings(address)[0].rstrip("/").rpartition("/")[2] if local else address
    return _code(shown) + (f" (its hash begins with {_code(digest)})" if digest else "")


def _rows(record: Mapping[str, Any], table: str) -> str:
    return f"; {record['rows'][table]:,} rows" if table in record["rows"] else ""


def _example(record: Mapping[str, Any], held: Sequence[str]) -> str:
    table = "maps" if "maps" in held and "grid" in record else "images"
    load = (
        f'from datasets import load_dataset\n\nrows = load_dataset("FOLDER or OWNER/NAME", "{table}", split="train")\n'
    )
    if table == "images":
        return load
    height, width = record["grid"]
    decode = f'np.frombuffer(row["map"], np.int8).reshape({height}, {width}) * row["scale"]'
    return f"import numpy as np\n{load}row = rows[0]\nrelevance = {decode}  # in the method's units\n"


def _code(text: str) -> str:
    """Any text, on one line, as Markdown that nothing in it can end: a code span longer than its longest run of backticks."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _read(uri: str, name: str) -> bytes | None:
    file = join_uri(uri, name)
    return read_bytes(file) if is_file(file) else None
