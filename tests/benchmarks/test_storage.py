"""benchmarks storage: every way gives the same rows back, and its arithmetic holds for values whose entropy is known."""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import encodings
from benchmarks.__main__ import main
from saecore import schema


def test_entropy_and_sizes_by_hand() -> None:
    """Four values, equally often, in no order: 2 bits each, so a quarter of the raw bytes, and ZSTD takes 26 % more."""
    maps = np.random.default_rng(0).integers(0, 4, (640, 64)).astype(np.int8)
    maps[:] = (
        np.random.default_rng(1).permutation(np.repeat(np.arange(4, dtype=np.int8), maps.size // 4)).reshape(maps.shape)
    )
    kind = schema.maps_schema(64)
    columns = [
        pa.array(np.repeat(np.arange(20), 32)),
        pa.array(np.arange(640) % 50, pa.int32()),
        pa.nulls(640, pa.string()),
        pa.array(["contrib"] * 640),
        pa.array([row.tobytes() for row in maps], pa.binary(64)),
        *[pa.array(np.ones(640, np.float32))] * 4,
    ]
    rows = {row.way: row for row in encodings.measure(pa.Table.from_arrays(columns, schema=kind), rounds=1)}
    assert rows["raw int8"].maps == 32 * 64
    assert rows["raw float32"].maps == 4 * 32 * 64
    assert rows["entropy"].maps == 32 * 64 / 4
    assert 32 * 64 / 4 <= rows["now"].maps < 1.3 * 32 * 64 / 4
    # Six of the eight planes are empty, and the other two are noise.
    assert 32 * 64 / 4 <= rows["bit planes"].maps < 1.3 * 32 * 64 / 4
    assert rows["none"].maps > 32 * 64


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "--shapes", "B/8"]) == 2
    assert "--shapes B/8: must be of B/32" in capsys.readouterr().err
