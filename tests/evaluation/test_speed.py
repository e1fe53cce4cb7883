"""The model benchmark measures packed caches, each against the exact one in the same round."""

import tiny

from tq_ao import quantize_kv_
from tq_ao.evaluation.speed import decode_speed


def test_rows():
    model = quantize_kv_(tiny.model())
    rows = decode_speed(model, 300, [2, 4], rounds=3, steps=2)
    assert [row["cache"] for row in rows] == ["exact", "2 bits", "4 bits"]
    assert rows[0]["ratio_median"] == rows[0]["ratio_p10"] == rows[0]["ratio_p90"] == 1.0
    for row in rows:
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
