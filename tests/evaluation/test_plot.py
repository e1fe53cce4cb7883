"""The plot of docs/quality.md shows what the committed result files say."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tq_ao.errors import TurboQuantError
from tq_ao.evaluation import plot

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def row(method: str, stored: float, kl: float) -> dict:
    return {"method": method, "stored_bits": stored, "kl": kl, "kl_stderr": kl / 8}


ONE = {"model": "one", "rows": [row(m, 4 - i % 2, 2.0**-i) for m in plot.STYLES for i in range(3)]}
TWO = {"model": "two", "rows": [row("uniform, plain", 3.25, 0.012345678), row("uniform, plain", 2.25, 0.5)]}


def description(path: Path) -> dict:
    namespace = "{http://purl.org/dc/elements/1.1/}"
    return json.loads(next(ElementTree.parse(path).iter(f"{namespace}description")).text)


def test_every_method_is_drawn_at_its_values():
    drawn = plot.figure([ONE, TWO])
    for axes, result in zip(drawn.axes, (ONE, TWO), strict=True):
        assert (axes.get_title(), axes.get_yscale()) == (result["model"], "log")
        found = {}
        for container in axes.containers:
            line, _, (bars,) = container.lines
            middle = [tuple(point) for point in line.get_xydata()]
            for (x, y), (low, high) in zip(middle, bars.get_segments(), strict=True):
                assert (*low, *high) == pytest.approx((x, 7 / 8 * y, x, 9 / 8 * y), rel=1e-3)
            found[container.get_label()] = middle
        assert found.keys() == {r["method"] for r in result["rows"]}
        for method, points in found.items():
            want = sorted((r["stored_bits"], r["kl"]) for r in result["rows"] if r["method"] == method)
            assert [x for x, _ in points] == [x for x, _ in want]
            assert [y for _, y in points] == pytest.approx([y for _, y in want], rel=1e-3)
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(plot.STYLES)


def test_the_file_says_what_is_drawn_and_is_the_same_each_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot.draw([ONE, TWO], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    numbers = description(tmp_path / "a.svg")
    assert list(numbers) == ["one", "two"]
    assert numbers["two"] == {"uniform, plain": [[2.25, 0.5, 0.0625], [3.25, 0.01235, 0.001543]]}


def test_a_method_without_a_style_is_named():
    with pytest.raises(TurboQuantError, match="'new'"):
        plot.curves({"model": "m", "rows": [row("new", 3.0, 0.1)]})


def test_results_of_all_layers_are_left_out(tmp_path):
    for name, result in (("pareto_two", TWO), ("pareto_one", ONE), ("pareto_one_all_layers", TWO), ("ablation_x", TWO)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    assert plot.results(tmp_path) == [ONE, TWO]


def test_committed_plot_is_of_the_committed_results():
    """The numbers it was drawn from: the rest of the file differs between versions of matplotlib."""
    want = {result["model"]: plot.curves(result) for result in plot.results(RESULTS)}
    assert {"gemma-3-270m", "smollm2-135m"} <= want.keys()
    found = description(ROOT / "docs" / "pareto.svg")
    assert found == json.loads(json.dumps(want)), "run `python scripts/evaluate.py plot`"
    assert list(found) == list(want)
    assert "(pareto.svg)" in (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
