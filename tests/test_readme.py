"""The quality tables of the README say what the committed result files say; speed: scripts/test_tables.py."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = {
    "the same, even levels": "uniform, plain",
    "25/50/25 by weight MSE": "25/50/25 by k_proj weight MSE",
    "**`--schedule auto`**": "schedule, calibrated",
}


def section(name: str) -> list[str]:
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.S)[1].strip().splitlines()


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
        said = {
            "SmolLM2-135M": f"{report['seconds']:.0f} s on two",
            "Qwen2.5-Coder": f"{report['seconds'] / 60:.0f} minutes on one",
        }
        assert all(time in README for name, time in said.items() if model.startswith(name))
