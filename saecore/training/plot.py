"""The course of a training as a picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


def training_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
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
