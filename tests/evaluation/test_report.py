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


def test_retrieval_rows_by_task_and_length():
    row = {
        "task": "passkey", "tokens": 4096, "method": "uniform", "code_bits": 2, "prompts": 3, "questions": 3,
        "right": 1, "log_probability": -2.5, "log_probability_stderr": 0.25, "change": -1.25,
        "change_stderr": 0.5, "lost": 2, "gained": 1, "packed_tokens": 3936, "bytes_per_token": 3240.0, "by_depth": {},
    }  # fmt: skip
    rows = [row, row | {"task": "key-value"}, row | {"tokens": 1024}]
    lines = table(RESULT | {"rows": rows}).splitlines()[-3:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| key-value", "4096"], ["| passkey", "1024"], ["| passkey", "4096"],
    ]  # fmt: skip
    assert lines[2].endswith("| 3936 | uniform | 2 | 3240 | 1 of 3 | 2, 1 | -2.50 ± 0.25 | -1.25 ± 0.50 |")
