"""The tables of the README and of docs/kernels.md say what the committed result files say."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
KERNELS = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
METHODS = {
    "the same, even levels": "uniform, plain",
    "25/50/25 by weight MSE": "25/50/25 by k_proj weight MSE",
    "**`--schedule auto`**": "schedule, calibrated",
}


def section(name: str, document: str = README) -> list[str]:
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", document, re.S)[1].strip().splitlines()


def test_attention_table():
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "table"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert section("attention") == [line for line in printed.splitlines() if line.startswith("|")]


def test_whole_model_table():
    result = json.loads((ROOT / "benchmarks" / "results" / "decode_llama-3-8b_h200.json").read_text())
    want = []
    for batch, length in dict.fromkeys((row["batch"], row["length"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["batch"], row["length"]) == (batch, length)]
        exact = min((row for row in rows if row["cache"] == "bf16"), key=lambda row: row["ms_median"])
        packed = {row["bits"]: row for row in rows if row["cache"] == "packed"}
        cells = [f"{exact['ms_median']:.2f} ms, {exact['cache_gib']:.1f} GiB"]
        for row in (packed[4], packed[3], packed[2]):
            speed = exact["ms_median"] / row["ms_median"]
            cells.append(f"{row['ms_median']:.2f} ms, {speed:.2f}x, {row['cache_gib']:.1f} GiB")
        want.append(f"| {batch} x {length} | {' | '.join(cells)} |")
    assert section("decode")[2:] == want


def test_quality_table():
    lines = section("quality")[2:]
    assert len(lines) >= 12
    for line in lines:
        model, method, bits, stored, kl, perplexity = (cell.strip() for cell in line.strip("|").split("|"))
        result = json.loads((ROOT / "benchmarks" / "results" / f"pareto_{model.lower()}.json").read_text())
        name = METHODS.get(method, method)
        row = next(r for r in result["rows"] if r["method"] == name and r["code_bits"] == float(bits))
        assert kl == f"{row['kl']:.5f} ± {row['kl_stderr']:.5f}"
        assert (stored, perplexity) == (f"{row['stored_bits']:.3g}", f"{100 * (row['ppl_ratio'] - 1):+.2f} %")


def test_converted_table():
    lines = section("converted")[2:]
    assert len(lines) == 3
    for line in lines:
        model, chosen, uniform, perplexity = (cell.strip() for cell in line.strip("|").split("|"))
        report = json.loads((ROOT / "benchmarks" / "results" / f"convert_{model.lower()}.json").read_text())
        base = report["baseline_uniform"]
        assert chosen == f"{report['kl']:.5f} ± {report['kl_stderr']:.5f}"
        assert uniform == f"{base['kl']:.5f} ± {base['kl_stderr']:.5f}"
        assert perplexity == f"{report['ppl_before']:.3f}, {report['ppl_after']:.3f}"


def test_prefill_tables():
    result = json.loads((ROOT / "benchmarks" / "results" / "prefill_h200.json").read_text())
    sides: dict[str, list[dict]] = {}
    for row in result["encode"]:
        what = f"D {row['head_dim']}, {row['bits']} bits, {row['map']}{', shifted' * row['shifted']}"
        what += ", feedback" * row["feedback"]
        sides.setdefault(what, []).append(row)
    want = [
        f"| {what} | {k['us_median']:.1f} / {v['us_median']:.1f} | "
        f"{k['percent_of_copy']:.0f} / {v['percent_of_copy']:.0f} % |"
        for what, (k, v) in sides.items()
    ]
    want += [
        f"| {row['q_len']} queries over {row['length']} tokens | {row['us_median']:.1f} | "
        f"{row['flash_us_median']:.1f} | {row['times_of_flash']:.2f} | {row['rel_error']:.1e} |"
        for row in result["extend"]
    ]
    assert [line for line in section("prefill", KERNELS) if line.startswith(("| D ", "| 1", "| 4"))] == want
