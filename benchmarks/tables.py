"""Tables in Markdown whose columns are aligned, so that they can be read on a screen and pasted into a page."""

from collections.abc import Sequence


def figures(value: float) -> str:
    """A positive number with three figures, or all before the point if these are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells each, the first of them the head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, " | ".join("-" * max(width, 3) for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
