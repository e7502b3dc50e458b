"""A run -> something to look at: a preview picture, and the summary that ends a job. Pages: `saecore.report.pages`."""

import io
import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from saecore.images import chunks as shards
from saecore.images import decode as images
from saecore.report import captions, display
from saecore.runs import durations
from saecore.runs import run as runs
from saecore.runs.fit import Fit
from saecore.storage import is_local, join_uri, read_parquet, split_settings, write_atomic


class Example(NamedTuple):
    """One image of a run with its first maps by the first method: of latents, where it has some, else of texts, or of concepts.

    Maps of one kind have one unit, so that they can share a scale.
    """

    key: str
    picture: np.ndarray  # uint8 (height, width, 3): the crop that CLIP saw, in the file's own pixels
    targets: list[str]
    pre_activations: list[float]
    maps: np.ndarray  # float32 (n targets, H, W), in the method's units
    meaning: str  # of the maps' colours


def examples(run: runs.Run, n_images: int, n_maps: int) -> Iterator[Example]:
    """The first images of a run that were not refused, read from the run's own files and the shards they came from."""
    return itertools.islice(_examples(run, n_maps), n_images)


def _examples(run: runs.Run, n_maps: int) -> Iterator[Example]:
    for chunk in run.plan().to_pylist():
        tables = {name: _chunk_table(run, name, chunk["chunk_id"]) for name in runs.TABLES}
        metadata = tables["maps"].schema.metadata
        grid = int(metadata[b"grid_height"]), int(metadata[b"grid_width"])
        shown = {row["image_id"]: row for row in tables["images"].to_pylist() if row["error"] is None}
        for raw in _read(chunk):
            for row in raw.to_pylist():
                if row["image_id"] not in shown or row["error"] is not None:  # the latter: gone since
                    continue
                image = shown[row["image_id"]]
                try:
                    picture = images.open_rgb(row["data"]).image
                except images.ImageError:  # another file by now
                    continue
                left, top, right, bottom = (image[f"crop_{side}"] for side in ("left", "top", "right", "bottom"))
                maps = _alike(_rows_of(tables["maps"], row["image_id"]))[:n_maps]
                yield Example(
                    key=row["key"],
                    picture=np.asarray(picture.crop((left, top, right, bottom))),
                    targets=[found["target"] or f"latent {found['latent']}" for found in maps],
                    pre_activations=[found["pre_activation"] for found in maps],
                    maps=np.stack([_decode(found, grid) for found in maps]),
                    meaning=captions.meaning(maps[0]["method"], _kind(maps[0])),
                )


def _read(chunk: Mapping[str, Any]) -> Iterator[pa.Table]:
    """The images of a chunk, or none if they are gone by now: a run is complete without a picture of it."""
    try:
        yield from shards.read_chunk(chunk)
    except OSError:
        return


def _alike(maps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of an image's rows of MAPS, which come by method, then by target: those of the first one's method and kind of target."""
    return [found for found in maps if (found["method"], _kind(found)) == (maps[0]["method"], _kind(maps[0]))]


def _kind(row: Mapping[str, Any]) -> str:
    return "latent" if row["target"] is None else row["target"].partition(":")[0]


def _decode(row: Mapping[str, Any], grid: tuple[int, int]) -> np.ndarray:
    """A MAPS row -> float32 (H, W) in pre-activation units."""
    return np.frombuffer(row["map"], np.int8).reshape(grid).astype(np.float32) * row["scale"]


def _rows_of(table: pa.Table, image_id: int) -> list[dict[str, Any]]:
    return table.filter(pc.equal(table["image_id"], image_id)).to_pylist()


def _chunk_table(run: runs.Run, name: str, chunk_id: int) -> pa.Table:
    return read_parquet(join_uri(run.uri, name, f"chunk-{chunk_id:08d}.parquet"))


def preview(found: list[Example], side: int = 232) -> Image.Image:
    """One row per image: the crop that CLIP saw, then the maps of its strongest latents on a scale shared in the row."""
    rows: list[list[display.Tile]] = []
    for example in found:
        picture, limit = display.resized(example.picture, side), display.shared_limit(example.maps)
        named = zip(example.targets, example.pre_activations, example.maps, strict=True)
        maps = [
            (display.overlay(picture, relevance, limit), f"{target[-26:]}   {value:.2f}")
            for target, value, relevance in named
        ]
        rows.append([(picture, example.key.rsplit("/", 1)[-1][-32:]), *maps])
    return display.mosaic(rows, foot=f"{found[0].meaning}; one scale per row")


def write_preview(run: runs.Run, n_images: int = 3, n_maps: int = 3) -> str | None:
    """`preview.png` in the run; returns where it is, or None if every image was refused."""
    found = list(examples(run, n_images, n_maps))
    if not found:
        return None
    address = join_uri(run.uri, "preview.png")
    write_atomic(address, display.png(preview(found)))
    return address


def summary(uri: str, record: Mapping[str, Any]) -> str:
    """run.json of a complete run, as a person reads it."""
    refused, size = record["refused"], record["bytes"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(refused.items())) or "none"
    sizes = ", ".join(f"{table} {_bytes(count)}" for table, count in size.items())
    lines = [
        f"images        {record['images']:,}, refused: {reasons}",
        f"time          {durations.waited(record)}",
        f"work          {durations.worked(record)}",
    ]
    if "worst_completeness_error" in record:
        worst = record["worst_completeness_error"]
        lines.append(f"exactness     {worst:.1e} worst error of map + remainder, in {record['parts']['dtype']}")
    if (fit := Fit(**record.get("fit", {}))).is_poor(least=1):
        lines.append(f"warning       {fit.words()}: does this SAE belong to this model?")
    lines += [f"warning       {said}" for said in _missing(record)]
    return "\n".join([*lines, f"on disk       {sizes} in {uri}"])


def _missing(record: Mapping[str, Any]) -> Iterator[str]:
    """What of the inputs could not be read: see `runs.missing`."""
    if lost := record.get("lost"):
        images = _count(lost["images"], "image")
        yield f"{images} of {_named_shards(lost)} could not be read: damaged or gone after the run was planned"
    if damaged := record.get("damaged"):
        yield f"{_named_shards(damaged)} ended in damage when the run was planned: what lay behind it is not known"


def _named_shards(found: Mapping[str, Any]) -> str:
    more = ", .." if found["shards"] > len(found["first"]) else ""
    return f"{_count(found['shards'], 'shard')} ({', '.join(found['first'])}{more})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


QUERY = """SELECT latent, count(*) AS images, round(avg(activation), 2) AS mean, round(max(activation), 2) AS strongest,
       arg_max(key, activation) AS strongest_image
FROM {activations} JOIN {images} USING (image_id)
WHERE activation > 0 GROUP BY latent ORDER BY images DESC, latent LIMIT 5"""


def next_steps(uri: str) -> str:
    """What to do with a complete run: commands to paste. At an address DuckDB alone would need to be told how to get in."""
    if is_local(uri):
        query = QUERY.format(activations=f"'{uri}/activations/*.parquet'", images=f"'{uri}/images/*.parquet'")
        ask = f'{_python()} - <<\'END\'\nimport duckdb\nduckdb.sql("""\n{query}\n""").show()\nEND'
    else:
        query = QUERY.format(activations="activations", images="images")
        ask = f'{_python()} -m jobs.query sql {shlex.quote(uri)} "\n{query}"'
    look = join_uri(uri, "preview.png")
    return f"\nLook at {look}, then ask which latents fire most often, and where most strongly:\n\n{ask}"


def pages_summary(folder: Path, latents: int, images: int, pictures: int, missing: int) -> str:
    """A report that was written, and where to look at it."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = [f"pages         {latents:,} latents, {images:,} images, {pictures:,} pictures, {_bytes(size)}"]
    if missing:
        lines.append(f"not found     {missing:,} pictures: their input has changed, or is gone or out of reach")
    return "\n".join([*lines, f"open          {(folder / 'index.html').as_uri()}"])


def _python() -> str:
    """This interpreter, as one would type it from here."""
    path, here = Path(sys.executable), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def outline(plan: pa.Table, verb: str, out: str, how: Sequence[str]) -> str:
    """What a plan holds and what would be done with it: the answer to --dry-run."""
    n_images = int(pc.sum(pc.subtract(plan["end"], plan["start"])).as_py() or 0)
    n_shards = len(pc.unique(plan["shard_id"]))
    damaged = plan.num_rows - plan["damage"].null_count
    held = f"{n_images:,} images of {n_shards:,} shards in {plan.num_rows:,} chunks"
    lines = [f"would {verb} {held} into {out}", *how]
    return "\n".join([*lines, f"{damaged} shards are damaged"] if damaged else lines)


# ---- SAEs.


UNIT_NORM = (
    "warning       every embedding has length 1: SAEs for CLIP are trained on embeddings before normalisation, "
    "as jobs.embed writes them"
)

UNIT_NORM_SITE = (
    "warning       every embedding has length 1, so this SAE brings embeddings to length 1 first (site embedding:l2); "
    "jobs.embed writes them as CLIP gives them"
)

COLUMNS = (
    ("step", ",d"),
    ("loss", ".4f"),
    ("fvu", ".4f"),
    ("cosine", ".4f"),
    ("l0", ".1f"),
    ("dead", ".1%"),
    ("cknna", ".3f"),
)


def training_header() -> str:
    """The head of the lines that follow."""
    return "".join(f"{name:>10}" for name, _ in COLUMNS)


def training_line(row: Mapping[str, Any]) -> str:
    """One evaluation, as a person reads it."""
    return "".join(f"{row[name]:>10{form}}" for name, form in COLUMNS)


def training_plot(rows: list[dict[str, Any]]) -> bytes:
    """The course of a training as a PNG: loss, unexplained variance, firing and dead latents over embeddings seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, 2)
    seen = [row["embeddings"] for row in rows]
    titles = {"loss": "training loss", "fvu": "FVU, held out", "l0": "L0, held out", "dead": "dead latents, held out"}
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        axis.plot(seen, [row[name] for row in rows], color="#e2580c", linewidth=1.8, marker="o", markersize=3)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("embeddings seen", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if name in ("loss", "fvu") and min(row[name] for row in rows) > 0:
            axis.set_yscale("log")
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    return content.getvalue()


def training_summary(record: Mapping[str, Any], out: str) -> str:
    """training.json, as a person reads it, and what to do next."""
    figures, recipe = record["figures"], record["recipe"]
    curve = ", ".join(f"{row['fvu']:.4f} at k = {row['k']}" for row in record["recovery"])
    lines = [
        f"SAE           {recipe['architecture']}, {recipe['latents']:,} latents on width {record['width']}",
        f"trained on    {record['rows'] - record['held-out']:,} embeddings, "
        f"{record['steps']:,} steps of {recipe['batch_size']:,} in {record['seconds']:.0f} s",
        f"held out      {figures['images']:,}: FVU {figures['fvu']:.4f}, cosine {figures['cosine']:.4f}, "
        f"L0 {figures['l0']:.1f}, dead {figures['dead']:.1%}, CKNNA {figures['cknna']:.3f}",
        f"FVU           {curve}",
    ]
    if record["unit_norm"]:
        lines.append(UNIT_NORM_SITE)
    return "\n".join([*lines, f"\nUse it: --sae {out}"])


MEANINGS = {
    "fvu": (".4f", "sum |x - x'|^2 / sum |x - mean|^2"),
    "fvu_msae": (".4f", "mean of Var(x - x') / Var(x) over an image's entries, as MSAE reports it"),
    "nmae": (".4f", "mean of |x - x'|_1 / |x|_1"),
    "cosine": (".4f", "mean of cos(x, x')"),
    "l0": (".1f", "latents that fire for an image"),
    "dead": (".1%", "of the latents fire for none of these images"),
    "cknna": (".4f", "agreement of neighbours before and after: 1 if they are the same, 0 if by chance"),
    "orthogonality": (".2e", "mean squared cosine between atoms"),
}
"""Figures of `saecore.evaluation.quality`: how they are printed, and what they are."""


def measured(found: Mapping[str, Any]) -> str:
    """What jobs.measure found, as a person reads it."""
    lines = [
        f"SAE           {found['architecture']}, {found['n_latents']:,} latents on width {found['n_inputs']}, "
        f"reads {found['site']}",
        f"measured on   {found['rows']:,} of {found['of']:,} embeddings",
    ]
    if found["unit_norm"] and found["site"] == "embedding":
        lines.append(UNIT_NORM)
    if found["remark"]:
        lines.append(found["remark"])
    if found["calibrated"]:
        lines.append(f"threshold     {found['threshold']:.4g}, calibrated here: it had none (k = {found['k']})")
    lines.append("")
    for name, (form, meaning) in MEANINGS.items():
        value = found["figures"][name]
        lines.append(f"{name:<14}{'none' if value is None else format(value, form):<12}{meaning}")
    lines.append(f"\n{'k strongest':>11}{'fvu':>10}{'cosine':>10}")
    lines += [f"{row['k']:>11,}{row['fvu']:>10.4f}{row['cosine']:>10.4f}" for row in found["recovery"]]
    lines.append("")
    for name, title in (("zero_shot", "zero-shot"), ("linear_probe", "linear probe")):
        if one := found.get(name):
            lines.append(f"{title:<14}{one['same']:.2%} same answer after reconstruction, KL {one['kl']:.4f} nats")
            if "accuracy" in one:
                lines[-1] += f", accuracy {one['accuracy']:.2%} -> {one['accuracy_reconstructed']:.2%}"
    if one := found.get("alignment"):
        lines.append(
            f"{'alignment':<14}{one['same']:.1%} of atoms above cosine 0.9 to their match in {one['against']}; "
            f"mean cosine of atoms {one['atoms']:.4f}, of encoders {one['encoders']:.4f}"
        )
    if "saved" in found:
        lines.append(f"{'saved':<14}{found['saved']}; use it: --sae {found['saved']}")
    return "\n".join(lines).rstrip()


def named(table: pa.Table, made_by: Mapping[str, Any], run: str, out: str, shown: int = 10) -> str:
    """What jobs.name found, as a person reads it: counts, the valid names of the widest margin, and what to ask next."""
    valid = table.filter(pc.equal(table["valid"], True)).sort_by([("margin", "descending")])
    by_data = pc.sum(table["by_data"]).as_py()
    how = [f"{table.num_rows - table['name'].null_count - by_data:,} by {'decoder' if by_data else made_by['by']}"]
    how = [f"{by_data:,} by data", *how] if by_data else how
    least = ", ".join(f"{name} at least {value:g}" for name, value in made_by["valid"].items() if value)
    lines = [
        f"vocabulary    {made_by['n_words']:,} words, {made_by['vocabulary']}",
        f"named         {' and '.join(how)} of {table.num_rows:,} latents",
        f"valid         {valid.num_rows:,} ({least or 'no thresholds'})",
        "",
        f"{'latent':>8}  {'name':<24}{'score':>8}{'margin':>8}  runner-up",
    ]
    lines += [
        f"{row['latent']:>8}  {row['name'][:23]:<24}{row['score']:>8.2f}{row['margin']:>8.2f}  {row['runner_up'][:23]}"
        for row in valid.slice(0, shown).to_pylist()
    ]
    file = join_uri(run, "latents.parquet") if run else out
    ask = f"FROM '{split_settings(file)[0]}' WHERE valid ORDER BY margin DESC"
    return "\n".join([*lines, f"\non disk       {file}: SELECT latent, name, score, margin {ask}"])


def _bytes(count: int) -> str:
    value, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
