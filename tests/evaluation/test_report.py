"""Tables in the documentation come from result files."""

import json

from tq_ao.evaluation.report import fill, table

RESULT = {
    "model": "m", "text": "t", "versions": {"torch": "2"}, "commit": "abcdef0123456", "device": "CPU",
    "rows": [{
        "method": "uniform", "code_bits": 3.0, "stored_bits": 3.25, "kl": 0.01, "kl_stderr": 0.001, "ppl_ratio": 1.005,
        "top1": 0.95,
    }],
}  # fmt: skip


def test_slots_are_filled_and_filling_again_changes_nothing(tmp_path):
    (tmp_path / "pareto_m.json").write_text(json.dumps(RESULT), encoding="utf-8")
    text = "a\n<!-- table: pareto_m -->\nold\n<!-- end -->\nb\n<!-- table: ablation_x -->\n<!-- end -->\n"
    filled = fill(text, tmp_path)
    assert "old" not in filled
    assert "| uniform | 3 | 3.25 | 0.01000 ± 0.00100 | +0.50 % | 95.0 % |" in filled
    assert "Not measured yet: `python scripts/evaluate.py ablation --model x`" in filled
    assert fill(filled, tmp_path) == filled


def test_methods_left_out_are_named_with_their_reason():
    assert "Not measured: hqq (needs a package)." in table(RESULT | {"left_out": {"hqq": "needs a package"}})
    assert "Not measured" not in table(RESULT | {"left_out": {}})
