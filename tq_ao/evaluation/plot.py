"""docs/pareto.svg: stored bits against KL, drawn from the files of `evaluate.py pareto` and from nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tq_ao.errors import TurboQuantError

# Calibrated methods stand out; what needs no calibration is dashed, and points are not joined across the bits between.
STYLES = {
    "schedule, calibrated": ("tab:blue", "o-"),
    "schedule, calibrated, repaired": ("tab:cyan", "*-"),
    "uniform, calibrated": ("tab:orange", "s-"),
    "schedule, plain": ("tab:blue", "o:"),
    "uniform, plain": ("tab:orange", "s:"),
    "TurboQuant (Lloyd-Max levels)": ("black", "d--"),
    "KIVI-style, groups of 32": ("tab:green", "^--"),
    "25/50/25 at random": ("grey", "v"),
    "25/50/25 by k_proj weight MSE": ("grey", "<"),
    "first and last layers protected": ("grey", ">"),
    "transformers quanto": ("tab:red", "x"),
    "transformers quanto, keys per channel": ("tab:purple", "+"),
    "transformers hqq": ("tab:brown", "X"),
}
Points = list[tuple[float, float, float]]


def results(folder: Path) -> list[dict[str, Any]]:
    """Of every model, in the order of their names; those with sliding-window layers quantised too are left out."""
    paths = sorted(path for path in folder.glob("pareto_*.json") if not path.stem.endswith("_all_layers"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def curves(result: dict[str, Any]) -> dict[str, Points]:
    """(stored bits, KL, its standard error) of every method, to four digits and in the order of STYLES.

    Raises:
        TurboQuantError: a method that has no style.
    """
    found: dict[str, Points] = {row["method"]: [] for row in result["rows"]}
    if unknown := sorted(found.keys() - STYLES):
        raise TurboQuantError(f"expected methods of {__name__}.STYLES, got {unknown}: add a colour and a marker")
    for row in result["rows"]:
        bits, kl, error = (float(f"{row[key]:.4g}") for key in ("stored_bits", "kl", "kl_stderr"))
        found[row["method"]].append((bits, kl, error))
    return {method: sorted(found[method]) for method in STYLES if method in found}


def figure(results: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure with one panel per result."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4 * len(results), 5.2), layout="constrained")
    panels = drawn.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    handles = {}
    for axes, result in zip(panels, results, strict=True):
        for method, points in curves(result).items():
            colour, form = STYLES[method]
            x, y, error = zip(*points, strict=True)
            handles[method] = axes.errorbar(
                x, y, error, fmt=form, color=colour, label=method, markersize=5, linewidth=1.2, elinewidth=0.8
            )
        axes.set(title=result["model"], xlabel="stored bits per value", yscale="log", xlim=(1.3, 5.3))  # 8 are beyond
        axes.minorticks_off()
        axes.grid(color="0.9", linewidth=0.6)
    panels[0].set_ylabel("KL against the exact cache, nats")
    labels = [method for method in STYLES if method in handles]
    drawn.legend(
        [handles[method] for method in labels], labels, loc="outside lower center", ncols=len(results), fontsize="small"
    )
    return drawn


def draw(results: Sequence[dict[str, Any]], output: Path) -> None:
    """Write the figure as SVG, the same bytes each time, with the drawn numbers as JSON in its description."""
    import matplotlib

    numbers = {result["model"]: curves(result) for result in results}
    metadata = {"Date": None, "Creator": None, "Description": json.dumps(numbers)}
    with matplotlib.rc_context({"svg.hashsalt": "tq_ao", "svg.fonttype": "none"}):
        figure(results).savefig(output, format="svg", metadata=metadata)
