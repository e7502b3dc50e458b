"""What the search of pages finds besides latents (`saecore.query.search`): texts and concepts by their words, images by name.

Latents, texts and concepts follow the rule of `saecore.query.search`, and so does `site/static/search.js` in the list of a
written report. In a file's name, everything but letters and digits separates words. Files come in this order: the query's word
is a whole word of the name; a word of the name begins with it; it occurs anywhere. All words of a query must occur.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from saecore.query.results import Results, number
from saecore.query.search import matching

RANK = r"""CASE WHEN regexp_matches(lower(key), '(^|[^\pL\pN])' || regexp_escape({word}) || '($|[^\pL\pN])') THEN 0
    WHEN regexp_matches(lower(key), '(^|[^\pL\pN])' || regexp_escape({word})) THEN 1 ELSE 2 END"""
"""SQL: how well a file's name fits one word that occurs in it, from 0, the best, to 2."""


def numbered(text: str) -> int | None:
    """The number that a text is, written as pages write it: `053` may be the beginning of a file's name, and is no number."""
    value = number(text)
    return value if str(value) == text else None


def find_targets(targets: Sequence[str], text: str) -> list[int]:
    """The places of the texts and concepts that hold these words."""
    return [place for _, place in matching(text, ((target, ()) for target in targets))]


def find_images(run: Results, text: str, most: int) -> list[tuple[int, str]]:
    """Number and key of the images that a text finds by the file's name or by the number; the best first, then by number."""
    words = text.lower().split()
    if not words:
        return []
    asked = [f"${place}" for place in range(3, 3 + len(words))]
    occur = " AND ".join(f"contains(lower(key), {word})" for word in asked)
    rank = f"greatest({', '.join([RANK.format(word=word) for word in asked])})"
    query = f"""SELECT image_id, key FROM images WHERE ({occur}) OR image_id = $1
        ORDER BY coalesce(image_id = $1, false) DESC, {rank}, image_id LIMIT $2"""
    rows = run.sql(query, numbered(text.strip()), most, *words).to_pylist()
    return [(row["image_id"], row["key"]) for row in rows]


def strongest_images(run: Results) -> dict[int, int]:
    """For each latent that fires, the image for which it fires most strongly."""
    known = run.latents
    if "top_images" in known.column_names and not len(run.tables.not_indexed):  # jobs.index wrote them
        rows = zip(known["latent"].to_pylist(), known["top_images"].to_pylist(), strict=True)
        return {latent: images[0] for latent, images in rows if images}
    query = """SELECT latent, arg_max(image_id, (activation, -image_id)) AS image_id
        FROM by_latent WHERE activation <> 0 GROUP BY latent"""
    return {row["latent"]: row["image_id"] for row in run.sql(query).to_pylist()}


def index(
    rows: Sequence[Mapping[str, Any]],
    strongest: Mapping[int, int],
    images: Sequence[tuple[int, str | None]],
    targets: Sequence[tuple[int, str]],
) -> dict[str, list[Any]]:
    """What `site/static/search.js` takes.

    latents: [number, name, other words, images, whether the name is valid, score, strongest image]. images: [number, name of
    the file]. targets: [place, words]. A written report adds `missing`, the numbers of images without a picture.
    """
    return {
        "latents": [
            [
                row["latent"],
                row["name"] or "",
                (row["words"] or [])[1:],
                row["images"],
                bool(row["valid"]),
                row["score"] or 0,
                strongest.get(row["latent"]),
            ]
            for row in rows
        ],
        "images": [[image_id, key or f"image {image_id}"] for image_id, key in images],
        "targets": [list(target) for target in targets],
    }
