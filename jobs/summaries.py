"""What jobs say to a person when they end: what came of the work, how good it is, and what to do next."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from saecore.images.chunks import count_images
from saecore.judging.verdict import Verdict
from saecore.judging.wording import Answer, tables_of
from saecore.runs import durations, latents
from saecore.runs.record import Record, Unread
from saecore.runs.refusals import Refusal
from saecore.sae.sites import reads_tokens
from saecore.storage import join_uri, split_settings

from . import commands
from .terminal import printable

# ---- Runs.


def run_summary(uri: str, record: Record) -> str:
    """run.json of a complete run, as a person reads it."""
    refused, size = record.refused, record.bytes
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(refused.items())) or "none"
    sizes = ", ".join(f"{table} {in_bytes(count)}" for table, count in size.items())
    lines = [
        f"images        {record.images:,}, refused: {reasons}",
        f"time          {durations.waited(record)}",
        f"work          {durations.worked(record)}",
    ]
    if (worst := record.worst_completeness_error) is not None:
        lines.append(f"exactness     {worst:.1e} worst error of map + remainder, in {record.dtype}")
    if (fit := record.fit).is_poor(least=1):
        lines.append(f"warning       {fit.words()}: does this SAE belong to this model?")
    lines += [f"warning       {said}" for said in _missing(record)]
    return "\n".join([*lines, f"on disk       {sizes} in {uri}"])


def vectors_summary(record: Record) -> str:
    """What a run of jobs.embed wrote of a site inside the tower."""
    n_images = record.images - record.n_refused
    rows = _count(n_images * record.n_vectors, "vector")
    return (
        f"vectors       {rows} of {record.embedded_site}, {record.n_outputs:,} numbers each: {record.n_vectors:,} of each of "
        f"{_count(n_images, 'image')}"
    )


def refused_images(uri: str, refused: Sequence[Refusal], is_explained: bool = True) -> str:
    """Which images were refused: of each reason the first few names, and how to ask for all."""
    lines = []
    for refusal in refused:
        names = ", ".join(map(printable, refusal.names)) + (", .." if refusal.images > len(refusal.names) else "")
        lines.append(f"{refusal.images:,} {refusal.reason}: {names}")
    if is_explained:
        query = "SELECT uri, key, error, error_detail FROM images WHERE error IS NOT NULL"
        lines.append(f"all of them: {commands.line('query', 'sql', uri, query)}")
    else:
        lines.append(f"all of them: the rows of {uri}/images whose column `error` is not null")
    return "\n".join(f"{'' if place else 'refused':<14}{line}" for place, line in enumerate(lines))


def _missing(record: Record) -> Iterator[str]:
    """Sentences about the inputs that could not be read: see `saecore.runs.commits.unread`."""
    if lost := record.lost:
        images = _count(lost.images or 0, "image")
        yield f"{images} of {_named_shards(lost)} could not be read: damaged or gone after the run was planned"
    if damaged := record.damaged:
        yield f"{_named_shards(damaged)} ended in damage when the run was planned: what followed the damage is not known"


def _named_shards(unread: Unread) -> str:
    more = ", .." if unread.shards > len(unread.first) else ""
    return f"{_count(unread.shards, 'shard')} ({', '.join(unread.first)}{more})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def outline(plan: pa.Table, verb: str, out: str, how: Sequence[str]) -> str:
    """What a plan holds and what would be done with it: the answer to --dry-run."""
    n_images = count_images(plan)
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


def training_summary(record: Mapping[str, Any], out: str) -> str:
    """training.json, as a person reads it, and what to do next."""
    figures, recipe = record["figures"], record["recipe"]
    curve = ", ".join(f"{row['fvu']:.4f} at k = {row['k']}" for row in record["recovery"])
    lines = [
        f"SAE           {recipe['architecture']}, {recipe['latents']:,} latents on width {record['width']}, "
        f"site {record.get('site', 'embedding')}",
        f"trained on    {record['rows'] - record['held-out']:,} embeddings, "
        f"{record['steps']:,} steps of {recipe['batch_size']:,} in {record['seconds']:.0f} s",
        f"held out      {figures['images']:,}: FVU {figures['fvu']:.4f}, cosine {figures['cosine']:.4f}, "
        f"L0 {figures['l0']:.1f}, dead {figures['dead']:.1%}, CKNNA {figures['cknna']:.3f}",
        f"FVU           {curve}",
    ]
    if record["unit_norm"]:
        lines.append(UNIT_NORM_SITE)
    pooled = " --pool max, mean or sum" if reads_tokens(record.get("site") or "embedding") else ""
    return "\n".join([*lines, f"\nUse it: --sae {out}{pooled}"])


def distill_summary(record: Mapping[str, Any], out: str) -> str:
    """distill.json, as a person reads it, and what to do next."""
    lines = [
        f"head          of {record['parts']['site']}, trained on {record['images']:,} images in {record['seconds']:.0f} s",
        f"held out      {record['held_out']:,} images against Shapley values by {record['held_out_subsets']:,} subsets each:",
        f"error         {record['error']:.3f} of their square, whitened; the sampling's own {record['error_of_sampling']:.3f}",
        f"ranks         agree by {record['rank_agreement']:.3f} (Spearman), mean of read-outs along the images' own embeddings",
    ]
    return "\n".join([*lines, f"\nUse it: --method removal --head {out}"])


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


def measuring_summary(report: Mapping[str, Any]) -> str:
    """What jobs.measure measured, as a person reads it."""
    lines = [
        f"SAE           {report['architecture']}, {report['n_latents']:,} latents on width {report['n_inputs']}, "
        f"reads {report['site']}",
        f"measured on   {report['rows']:,} of {report['of']:,} embeddings",
    ]
    if report["unit_norm"] and report["site"] == "embedding":
        lines.append(UNIT_NORM)
    if report["remark"]:
        lines.append(report["remark"])
    if report["calibrated"]:
        lines.append(f"threshold     {report['threshold']:.4g}, calibrated here: it had none (k = {report['k']})")
    lines.append("")
    for name, (form, meaning) in MEANINGS.items():
        value = report["figures"][name]
        lines.append(f"{name:<14}{'none' if value is None else format(value, form):<12}{meaning}")
    lines.append(f"\n{'k strongest':>11}{'fvu':>10}{'cosine':>10}")
    lines += [f"{row['k']:>11,}{row['fvu']:>10.4f}{row['cosine']:>10.4f}" for row in report["recovery"]]
    lines.append("")
    for name, title in (("zero_shot", "zero-shot"), ("linear_probe", "linear probe")):
        if one := report.get(name):
            lines.append(f"{title:<14}{one['same']:.2%} same answer after reconstruction, KL {one['kl']:.4f} nats")
            if "accuracy" in one:
                lines[-1] += f", accuracy {one['accuracy']:.2%} -> {one['accuracy_reconstructed']:.2%}"
    if one := report.get("alignment"):
        lines.append(
            f"{'alignment':<14}{one['same']:.1%} of atoms above cosine 0.9 to their match in {one['against']}; "
            f"mean cosine of atoms {one['atoms']:.4f}, of encoders {one['encoders']:.4f}"
        )
    if "saved" in report:
        lines.append(f"{'saved':<14}{report['saved']}; use it: --sae {report['saved']}")
    return "\n".join(lines).rstrip()


def naming_summary(table: pa.Table, made_by: Mapping[str, Any], run: str, out: str, shown: int = 10) -> str:
    """What jobs.name found, as a person reads it: counts, and the valid names with the widest margin."""
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
    place = join_uri(run, latents.NAME) if run else out
    lines += ["", f"on disk       {split_settings(place)[0]}"]
    return "\n".join(lines)


def verdict_tables(found: Verdict) -> str:
    """A table for each question that was measured, a row for each method."""
    return "\n\n".join(_verdict_table(table) for table in tables_of(found))


def _verdict_table(table: Answer) -> str:
    lines = [f"{'':<16}" + "".join(f"{name:>16}" for name in table.columns)]
    lines += [f"{method:<16}" + "".join(f"{cell:>16}" for cell in cells).rstrip() for method, cells in table.rows]
    return "\n".join([table.question, *lines])


# ---- Sizes.


def in_bytes(count: int) -> str:
    """A size as people write it: `3.4 MB`."""
    value, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
