"""scripts/tables.py: the committed documents show the committed result files, and follow them."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import tables

ROOT = Path(__file__).parents[2]
DOCUMENTS = [(ROOT / name).read_text(encoding="utf-8") for name in tables.DOCUMENTS]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scripts/tables.py over copies of the documents and the result files."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", *options])
    tables.main()


def test_speed_tables_are_the_files(written, monkeypatch):
    run(monkeypatch, "--check")
    shown = set(re.findall(r"<!-- (\w+_\S+) -->", "".join(DOCUMENTS)))
    kinds = ("attention", "prefill", "decode_llama")
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*_h?00*.json")}
    assert shown == {stem for stem in results if stem.startswith(kinds)} >= {"attention_h100", "attention_h200"}


@pytest.mark.parametrize(("stem", "rows", "key"), [
    ("attention_h100", "rows", "us_median"), ("prefill_h100", "extend", "flash_us_median"),
    ("decode_llama-3-8b_h200", "rows", "ms_median"),
])  # fmt: skip
def test_speed_tables_follow_the_files(written, monkeypatch, stem, rows, key):
    path = written / "benchmarks" / "results" / f"{stem}.json"
    result = json.loads(path.read_text())
    for row in result[rows]:
        row[key] *= 1000
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=f"result files say: {stem};"):
        run(monkeypatch, "--check")
    run(monkeypatch)
    run(monkeypatch, "--check")
    anew = [(written / name).read_text(encoding="utf-8") for name in tables.DOCUMENTS]
    lines = zip("\n".join(anew).splitlines(), "\n".join(DOCUMENTS).splitlines(), strict=True)
    differing = [new for new, old in lines if new != old]
    assert len(differing) >= 4 and all(re.search(r"\d{4,}\.\d", line) for line in differing)


def test_cache_too_large_for_the_gpu():
    """What the H100's file has of 64 GiB in bf16: no time, so no ratio."""
    own = [{"cache": "packed", "bits": b, "batch": 2, "length": 9, "ms_median": b, "cache_gib": b} for b in (4, 3, 2)]
    none = {"cache": "bf16", "bits": 16, "batch": 2, "length": 9, "ms_median": None, "cache_gib": 64.0}
    *_, line = tables.decode({"rows": [none, *own]})
    assert line == "| 2 x 9 | 64.0 GiB: does not fit | 4.00 ms, 4.0 GiB | 3.00 ms, 3.0 GiB | 2.00 ms, 2.0 GiB |"
