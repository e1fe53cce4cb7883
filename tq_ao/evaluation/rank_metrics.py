"""Which sensitivity metric ranks layers as the measured KL does."""

from collections.abc import Callable, Sequence
from typing import Any

from tq_ao.calibration.sensitivity import METRICS, Table, sensitivity
from tq_ao.evaluation.ranking import correlations
from tq_ao.evaluation.setup import Setup, provenance


def rank_metrics(
    setup: Setup, bits: Sequence[int], window: int, sinks: int, seed: int, progress: bool, report: Callable[[str], None]
) -> dict[str, Any]:
    """Every metric on calibration text, against per-layer KL measured on held-out text, plain maps.

    Returns:
        {model, text, ..., rows: [{metric, key, value, both}], tables: {metric: {"layer/side/bits": value}}}.
    """

    def table(metric, text) -> Table:  # type: ignore[no-untyped-def]
        return sensitivity(
            setup.model, text, setup.plain, metric, bits=bits, window=window, sinks=sinks, seed=seed, progress=progress
        )

    origin = provenance()
    truth = table("kl", setup.evaluation)
    rows, tables = [], {"kl, held out": truth}
    for metric in METRICS:
        found = tables[metric] = table(metric, setup.calibration)
        rows.append({"metric": metric, **correlations(found, truth)})
        report(f"{metric:12s} " + "  ".join(f"{k} {v:+.3f}" for k, v in rows[-1].items() if k != "metric"))
    named = {m: {f"{i}/{side}/{b}": v for (i, side, b), v in t.items()} for m, t in tables.items()}
    return {
        "model": setup.name,
        "text": setup.text,
        **origin,
        "window": window,
        "sinks": sinks,
        "rows": rows,
        "tables": named,
    }
