"""README.md of a run: a dataset card, with which Hugging Face `datasets` and the Hub read the run's tables as they are.

    datasets.load_dataset("runs/photos", "maps")     # without a name: images

The card's front matter names the tables of the run, each by a glob; its text says what made them and how a map is decoded. The
card is made to be published: of a model on a disk it shows only the last part of the path, and it shows neither the command nor
the inputs, which run.json has. A card without the line `MARK` belongs to whoever removed the line, and is not written again.
"""

import json
import re
from collections.abc import Sequence

from saecore.runs.record import Record
from saecore.storage import is_file, join_uri, read_bytes, split_settings, write_atomic

NAME = "README.md"

MARK = "<!-- Relevance Map SAE writes this card again when tables are added. Remove this line to keep it as it is. -->"

TABLES = {
    "images": ("images/*.parquet", "a row for every image that was found, refused images too"),
    "activations": ("activations/*.parquet", "the latents that were kept of each image, strongest first"),
    "maps": ("maps/*.parquet", "relevance maps: one signed number for each patch of the image"),
    "faithfulness": ("faithfulness/*.parquet", "a row for each image, target, method and metric: how good a map is"),
    "curves": ("curves/*.parquet", "the value of each target as patches are taken out by the order of a map"),
    "latents": ("latents.parquet", "a row for every latent: what it does, what it is called"),
    "by_latent": ("by_latent/*.parquet", "`activations`, sorted by latent and by falling activation"),
    "top_images": ("top_images/*.parquet", "the strongest images of each latent, with all that is needed to show them"),
}
"""Glob of each table below the run, and what the table holds. `load_dataset` takes the first that a run has by default."""

PUBLISHING = """## Before it is published

This card holds no paths. Other files do: `run.json`, `run.log`, `plan.parquet`, the column `uri` of `images` and `top_images`,
and the metadata of Parquet files say where images and models lay on the machine that made them; `report/` shows the images
themselves. The licence is that of the images, and yours to state: `license:` at the top of this card.

```bash
hf upload OWNER/NAME FOLDER . --repo-type dataset
```"""


def write(uri: str, record: Record) -> None:
    """Write the card of the run at `uri` from its record and its files, but not over a card that somebody made their own."""
    before = _read(uri, NAME)
    if before is not None and MARK not in before.decode(errors="replace"):
        return
    content = text(split_settings(uri)[0].rstrip("/").rpartition("/")[2], record, tables(uri, record)).encode()
    if content != before:
        write_atomic(join_uri(uri, NAME), content)


def tables(uri: str, record: Record) -> list[str]:
    """The names in `TABLES` that have files. A glob without files would make `load_dataset` fail for that table."""
    held = {name for name, rows in record.rows.items() if rows}
    if is_file(join_uri(uri, "latents.parquet")):
        held.add("latents")
    index = json.loads(_read(uri, "by_latent/_index.json") or "{}")
    folders = {"rows": "by_latent", "top": "top_images"}
    held |= {folders[kind] for segment in index.get("segments", []) for kind in folders if segment[kind]}
    return [name for name in TABLES if name in held]


def text(name: str, record: Record, held: Sequence[str]) -> str:
    """The card of a run of that name with these tables."""
    facts = [f"- {name}: {fact}" for name, fact in _facts(record).items() if fact]
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


def _what(record: Record) -> str:
    if record.embedded_site:
        return "CLIP makes of a collection of images inside its image tower: vectors"
    if record.kind == "embed":
        return "CLIP makes of a collection of images: embeddings"
    if record.kind == "evaluate":
        return "removing patches does to what relevance maps explain: whether the maps of a run are true"
    return "a CLIP and a sparse autoencoder see in a collection of images, and where"


def _facts(record: Record) -> dict[str, str]:
    """What made the run and how much it holds; empty strings for what its record does not say."""
    parts, worst = record.parts, record.worst_completeness_error
    grid = ["{} x {} patches".format(*record.grid)] if any(record.grid) else []
    latents = f", {record.n_latents:,} latents" if record.sae_address else ""
    return {
        "images": f"{record.images:,}" + (f", of which {record.n_refused:,} were refused" if record.n_refused else ""),
        "CLIP": _model(record.clip, record.sha256_of("clip")),
        "site of the vectors": _code(record.embedded_site) if record.embedded_site else "",
        "SAE": _model(record.sae_address, record.sha256_of("sae")) + latents,
        "site": "" if record.has_words else f"{_code(record.site)}{', pooled by ' * bool(record.pool)}{record.pool}",
        "maps": ", ".join([*map(_code, record.methods), *grid]),
        "of": ", ".join(map(_code, parts.get("targets", []))),
        f"latents {'judged' if record.kind == 'evaluate' else 'kept'} of each image": f"{parts['k']}"
        if "k" in parts
        else "",
        "worst error of map + remainder": "" if worst is None else f"{worst:.1e}",
        "made": record.started[:10],
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }


def _model(address: str, digest: str) -> str:
    """A model by its id on the Hub, or by the last part of its path: where the model lies is private."""
    if not address:
        return ""
    local = address.startswith("/") or ("://" in address and not address.startswith("hf://"))
    shown = split_settings(address)[0].rstrip("/").rpartition("/")[2] if local else address
    return _code(shown) + (f" (its hash begins with {_code(digest)})" if digest else "")


def _rows(record: Record, table: str) -> str:
    return f"; {record.rows[table]:,} rows" if table in record.rows else ""


def _example(record: Record, held: Sequence[str]) -> str:
    table = "maps" if "maps" in held and any(record.grid) else "faithfulness" if "faithfulness" in held else "images"
    load = (
        f'from datasets import load_dataset\n\nrows = load_dataset("FOLDER or OWNER/NAME", "{table}", split="train")\n'
    )
    if table != "maps":
        return load
    height, width = record.grid
    decode = f'np.frombuffer(row["map"], np.int8).reshape({height}, {width}) * row["scale"]'
    return f"import numpy as np\n{load}row = rows[0]\nrelevance = {decode}  # in the method's units\n"


def _code(text: str) -> str:
    """Any text on one line as a Markdown code span, fenced by more backticks than the text has in a row: nothing can end it."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _read(uri: str, name: str) -> bytes | None:
    file = join_uri(uri, name)
    return read_bytes(file) if is_file(file) else None
