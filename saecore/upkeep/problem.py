"""What is wrong with a file of a run folder, and what mends it."""

from typing import NamedTuple


class Problem(NamedTuple):
    """Something in a run folder that is not as it was written."""

    path: str
    """Of the file, below the run."""
    what: str
    remedy: str
    """What mends it: the `chunk` is done again, the run is `close`d again, the `index` or `name`s are made again, or whoever
    put the file there has to `move` it."""
    chunk_id: int | None = None
