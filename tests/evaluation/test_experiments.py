"""The experiments run end to end on a tiny model and write what their readers expect."""

import pytest
import tiny
import torch

from tq_ao.calibration.allocation import Shape
from tq_ao.evaluation.ablation import GAIN_SHARES, ablation
from tq_ao.evaluation.pareto import Options, pareto
from tq_ao.evaluation.rank_metrics import rank_metrics
from tq_ao.evaluation.setup import Setup, plain_maps
from tq_ao.evaluation.transformers_cache import KINDS, PACKAGES


@pytest.fixture
def setup(rng, request):
    model = tiny.model(getattr(request, "param", "llama"), num_hidden_layers=4)
    plain = plain_maps(model, [0, 1, 2, 3])
    windows = torch.randint(2, 97, (8, 160), generator=rng)
    shape = Shape({i: tuple(m.key_shift.shape) for i, m in plain.items()})
    return Setup("tiny", model, windows[:3], windows[3:6], windows[6:], plain, shape, "random tokens")


def test_pareto_rows(setup):
    found = pareto(setup, Options(budgets=(2.5,), window=16, sinks=2, repair_evaluations=3))
    methods = [row["method"] for row in found["rows"]]
    ranked = ("25/50/25 by k_proj weight MSE", "25/50/25 at random")
    for method in (
        *ranked,
        "uniform, plain",
        "uniform, calibrated",
        "schedule, plain",
        "schedule, calibrated, repaired",
    ):
        assert method in methods
    assert {"model", "text", "versions", "commit", "device", "rows"} <= set(found)
    published = [row["code_bits"] for row in found["rows"] if row["method"] == "TurboQuant (Lloyd-Max levels)"]
    assert published == [2, 3, 4]
    for method in KINDS:
        assert (method in methods) != bool(found["left_out"].get(method))
        if method in methods:
            assert PACKAGES[KINDS[method].backend] in found["versions"]
    for row in found["rows"]:
        assert row["kl"] > 0
        assert row["stored_bits"] > row["code_bits"]
        assert (row["window"], row["sinks"]) == (16, 0 if row["method"] in KINDS else 2)
        if "schedule" in row:
            pairs = row["schedule"].values()
            assert row["code_bits"] == pytest.approx(sum(k + v for k, v in pairs) / 8, abs=1e-4)
    by_bits = {row["code_bits"]: row["kl"] for row in found["rows"] if row["method"] == "uniform, plain"}
    assert by_bits[2] > by_bits[3] > by_bits[4]


@pytest.mark.parametrize("setup", ["phi4_mini"], indirect=True)
def test_a_model_with_one_projection_for_q_k_and_v_has_no_rank_by_k_proj(setup):
    found = pareto(setup, Options(budgets=(), window=16, sinks=2))
    name = "25/50/25 by k_proj weight MSE"
    assert "k_proj" in found["left_out"][name] and name not in [row["method"] for row in found["rows"]]
    assert "25/50/25 at random" in [row["method"] for row in found["rows"]]


def test_ablation_rows(setup):
    found = ablation(setup, [2.5], 16, 2, 0)
    gains = [row for row in found["rows"] if row["experiment"] == "gain"]
    assert len(gains) == len(GAIN_SHARES)
    assert len({row["kl"] for row in gains}) == len(gains)
    assert {row["experiment"] for row in found["rows"]} == {"keys only", "values only", "gain", "decoder"}


def test_rank_metrics_table(setup):
    found = rank_metrics(setup, (2,), 16, 2, 0, False, lambda line: None)
    rows = {row["metric"]: row for row in found["rows"]}
    assert set(rows) == {"weight", "activation", "output", "taylor", "kl"}
    assert all(abs(row["both"]) <= 1 + 1e-9 for row in rows.values())
    assert set(found["tables"]["taylor"]) == {f"{i}/{side}/2" for i in range(4) for side in ("key", "value")}
