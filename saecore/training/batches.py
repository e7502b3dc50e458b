"""Batches of embeddings in a random order, which is a function of seed and step, so that training resumes exactly anywhere.

    epoch: blocks in a random order -> windows as large as the buffer -> the rows of a window, mixed -> batches

Every row comes once in an epoch. Data no larger than the buffer is mixed as a whole. Larger data is mixed within a window,
whose blocks come from everywhere.

Left out: weights or classes of rows.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from saecore.training.embeddings import Embeddings

BUFFER_ROWS = 131_072
"""Rows mixed at once: 400 MB at width 768, and twice as much while the next rows are read."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Endless batches of the rows to train on."""

    source: Embeddings
    held_out: np.ndarray
    """int64, ascending: rows that are never in a batch."""
    batch_size: int
    seed: int
    buffer_rows: int = BUFFER_ROWS

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the rows to train on. Rows that do not fill a batch are omitted in this epoch."""
        return (int(self.source.block_rows.sum()) - len(self.held_out)) // self.batch_size

    def start(self, step: int) -> Iterator[np.ndarray]:
        """float32 (batch_size, width) for every step from `step` on."""
        epoch, first = divmod(step, self.steps_per_epoch)
        while True:
            yield from self._epoch(epoch, first)
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        windows, position, skip = self._windows(epoch), 0, first * self.batch_size
        needed = []
        for index, (blocks, length) in enumerate(windows):
            if position + length > skip:
                needed.append((index, blocks, max(0, skip - position)))
            position += length
        rest = np.zeros((0, self.source.width), np.float32)
        with ThreadPoolExecutor(1) as reader:  # the next window is read while this one is trained on
            coming = reader.submit(self._read, epoch, *needed[0][:2])
            for place, (_, _, offset) in enumerate(needed):
                rows = coming.result()[offset:]
                if place + 1 < len(needed):
                    coming = reader.submit(self._read, epoch, *needed[place + 1][:2])
                rows = np.concatenate([rest, rows]) if len(rest) else rows
                whole = len(rows) // self.batch_size * self.batch_size
                for start in range(0, whole, self.batch_size):
                    yield rows[start : start + self.batch_size]
                rest = rows[whole:]

    def _windows(self, epoch: int) -> list[tuple[list[int], int]]:
        """The epoch's blocks in their random order, cut where the buffer is full, and how many rows each part has."""
        bounds = np.concatenate([[0], np.cumsum(self.source.block_rows)])
        rows = self.source.block_rows - np.diff(np.searchsorted(self.held_out, bounds))
        windows: list[tuple[list[int], int]] = []
        blocks: list[int] = []
        held = 0
        for block in np.random.default_rng((self.seed, epoch)).permutation(len(rows)):
            blocks.append(int(block))
            held += int(rows[block])
            if held >= self.buffer_rows:
                windows.append((blocks, held))
                blocks, held = [], 0
        return [*windows, (blocks, held)] if held else windows

    def _read(self, epoch: int, window: int, blocks: list[int]) -> np.ndarray:
        """The rows to train on of a window, in the order of this epoch."""
        starts = np.concatenate([[0], np.cumsum(self.source.block_rows)])
        parts = []
        for block in blocks:
            inside = self.held_out[slice(*np.searchsorted(self.held_out, starts[block : block + 2]))] - starts[block]
            parts.append(np.delete(self.source.read(block), inside, axis=0))
        rows = np.concatenate(parts)
        return rows[np.random.default_rng((self.seed, epoch, window)).permutation(len(rows))]
