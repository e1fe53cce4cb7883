"""Sensitivities: Fisher against measured KL, resuming, the metrics' interface."""

import importlib
import json
from dataclasses import replace

import layer_state
import pytest
import tiny
import torch

from tq_ao.calibration.calibrate import calibrate
from tq_ao.calibration.gain import SHARE, compensated, gain
from tq_ao.calibration.journal import Journal
from tq_ao.calibration.sensitivity import METRICS, sensitivity
from tq_ao.evaluation.ranking import correlations, spearman
from tq_ao.evaluation.setup import plain_maps
from tq_ao.footprint import maps_bytes, memory_budget
from tq_ao.measure.evaluator import Evaluator


@pytest.fixture
def windows(rng):
    return torch.randint(2, 97, (4, 160), generator=rng)


def test_fisher_predicts_measured_kl(windows):
    model = tiny.model(num_hidden_layers=6)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.mul_(0.15 * 1.8**i if i % 2 else 0.3)
    maps = plain_maps(model, list(range(6)))
    common = {"bits": (2, 3), "window": 16, "sinks": 2}
    measured = sensitivity(model, windows, maps, "kl", **common)
    estimated = sensitivity(model, windows, maps, "taylor", rows=96, **common)
    assert correlations(estimated, measured)["both"] > 0.7
    ratio = torch.tensor([estimated[p] / measured[p] for p in measured]).log()
    assert ratio.median().abs() < 1.0


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_every_place_and_falls_with_bits(metric, windows):
    model = tiny.model()
    table = sensitivity(model, windows[:1], plain_maps(model, [0, 2]), metric, bits=(1, 4), window=16, sinks=2)
    assert set(table) == {(i, side, b) for i in (0, 2) for side in ("key", "value") for b in (1, 4)}
    assert all(table[i, side, 4] < table[i, side, 1] for i in (0, 2) for side in ("key", "value"))


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_rounds_with_the_feedback_of_each_side(metric, windows, rng):
    """A map with feedback is scored as the cache would use it: other than without, on the side that has it only."""
    model, fed = tiny.model(), layer_state.maps(2, 32, rng, feedback=True)

    def table(maps):
        return sensitivity(model, windows[:1], {1: maps}, metric, bits=(3,), window=16, sinks=2)

    bare = table(replace(fed, key_feedback=None, value_feedback=None))
    for side in ("key", "value"):
        got = table(replace(fed, **{f"{other}_feedback": None for other in ("key", "value") if other != side}))
        changed = {place for place in got if got[place] != bare[place]}
        assert changed == {(1, side, 3)}


def test_gains_are_halved_where_there_is_feedback(rng):
    fed = replace(layer_state.maps(2, 32, rng, feedback=True), value_feedback=None)
    found = compensated(fed, 2, 3)
    torch.testing.assert_close(found.query, fed.query * gain(2, "key", SHARE["key"] / 2))
    torch.testing.assert_close(found.output, fed.output * gain(3, "value", SHARE["value"]))
    other = compensated(replace(fed, key_feedback=None, value_feedback=fed.key_feedback), 2, 3)
    torch.testing.assert_close(other.query, fed.query * gain(2, "key", SHARE["key"]))
    torch.testing.assert_close(other.output, fed.output * gain(3, "value", SHARE["value"] / 2))


def test_unknown_metric_names_the_known_ones(windows):
    model = tiny.model()
    with pytest.raises(ValueError, match="taylor"):
        sensitivity(model, windows, plain_maps(model, [0]), "hessian")


@pytest.mark.parametrize("metric", ["taylor", "kl"])
def test_a_killed_run_continues(metric, windows, tmp_path, monkeypatch):
    model = tiny.model()
    maps = plain_maps(model, [0, 1, 2])
    path = tmp_path / "journal"
    common = {"bits": (2, 3), "window": 16, "sinks": 2}
    whole = sensitivity(model, windows, maps, metric, **common)
    put, left = Journal.put, [2]

    def dying(self, key, value):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        put(self, key, value)

    monkeypatch.setattr(Journal, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, windows, maps, metric, journal=Journal(path, "run"), **common)
    monkeypatch.setattr(Journal, "put", put)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "half a li')
    journal = Journal(path, "run")
    assert len(journal) == 2
    assert sensitivity(model, windows, maps, metric, journal=journal, **common) == pytest.approx(whole, rel=1e-4)
    assert len(Journal(path, "another run")) == 0
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == {"fingerprint": "another run"}


def test_spearman():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 5.0])) == pytest.approx(1)


@pytest.mark.parametrize("maps", ["plain", "auto"])
def test_calibrate_keeps_the_budget_and_resumes(maps, windows, tmp_path):
    model = tiny.model(num_hidden_layers=4)
    plain = plain_maps(model, [0, 1, 2, 3])
    arguments = {"bits": 2.5, "window": 16, "sinks": 2, "maps": maps, "journal": tmp_path / "journal"}
    result = calibrate(model, windows[:3], plain, repair_evaluations=2, **arguments)
    assert result.average_bits <= 2.5
    assert set(result.schedule) == {0, 1, 2, 3}
    assert (result.maps is None) == (maps == "plain")
    again = calibrate(model, windows[:3], plain, **arguments)
    assert again.table == pytest.approx(result.table, rel=1e-6)


@pytest.mark.parametrize("maps", ["plain", "auto"])
@pytest.mark.parametrize("limits", [{}, {"max_kl": 1e6}])
def test_calibrate_keeps_a_budget_in_bytes(maps, limits, windows, monkeypatch):
    """What it decides and every schedule it measures, with the maps each comes with."""
    model, kept = tiny.model(num_hidden_layers=4), []
    plain = plain_maps(model, [0, 1, 2, 3])
    memory = memory_budget(model.config, 0.45, 1000, window=16, sinks=2, calibrated=True)

    def held(plans):
        sizes = replace(memory, maps={i: maps_bytes(plan.maps) for i, plan in plans.items()})
        return sizes.needed(sizes.total({i: (plan.k_bits, plan.v_bits) for i, plan in plans.items()}))

    real = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda self, plans: kept.append(held(plans)) or real(self, plans))
    arguments = {"memory": memory, "limits": limits, "widths": (1, 2, 3, 4, 8), "window": 16, "sinks": 2, "maps": maps}
    result = calibrate(model, windows[:3], plain, repair_evaluations=4, **arguments)
    assert len(kept) >= 2 and max(kept) <= 0.45
    assert set(result.schedule) == {0, 1, 2, 3}
    if limits:  # anything is good enough: the least there is
        assert kept[-1] < 0.36  # what feedback in every layer needs at the least is .353
    else:
        assert max(kept) > 0.4, "room is used"
    packed = {i for i, pair in result.schedule.items() if pair != (16, 16)}
    assert result.maps is None if maps == "plain" else set(result.maps) == packed


def test_maps_of_layers_that_stay_exact_are_not_kept(windows):
    model = tiny.model(num_hidden_layers=4)
    memory = memory_budget(model.config, 0.45, 1000, window=16, sinks=2, calibrated=True)
    roomy = replace(memory, mib=memory.needed(sum(memory.exact.values()) - 1))
    arguments = {"memory": roomy, "widths": (4, 8), "window": 16, "sinks": 2, "maps": "auto"}
    result = calibrate(model, windows[:3], plain_maps(model, [0, 1, 2, 3]), **arguments)
    exact = {i for i, pair in result.schedule.items() if pair == (16, 16)}
    assert exact and set(result.maps) == {0, 1, 2, 3} - exact


def test_a_budget_is_one_of_bits_and_memory(windows):
    model = tiny.model()
    memory = memory_budget(model.config, 0.4, 1000, window=16, sinks=2, calibrated=True)
    for budget in ({}, {"bits": 3, "memory": memory}):
        with pytest.raises(ValueError, match="expected a budget of bits or of memory"):
            calibrate(model, windows[:3], plain_maps(model, [0, 1, 2]), **budget)
    with pytest.raises(ValueError, match=r"at least 0\.\d+ MiB"):
        calibrate(model, windows[:3], plain_maps(model, [0, 1, 2]), memory=replace(memory, mib=0.1), maps="plain")


@pytest.mark.parametrize("maps", ["plain", "auto"])
def test_recall_windows_count_in_what_is_chosen_but_not_in_what_is_measured(maps, windows, rng, monkeypatch):
    model, seen = tiny.model(), {}
    calibration = importlib.import_module("tq_ao.calibration.calibrate")  # its function has the same name
    recall = torch.randint(2, 97, (3, 160), generator=rng)

    def spy(name, at):
        real = getattr(calibration, name)

        def call(*args, **kwargs):
            seen[name] = args[at]
            return real(*args, **kwargs)

        monkeypatch.setattr(calibration, name, call)

    for name in ("collect", "choose_variants", "sensitivity", "Evaluator"):
        spy(name, 1)
    calibrate(
        model, windows, plain_maps(model, [0, 1, 2]), recall=recall, bits=2, window=16, sinks=2, maps=maps,
        repair_evaluations=1,
    )  # fmt: skip
    if maps == "auto":  # two thirds of each kind, the rest of each kind
        assert torch.equal(seen["collect"], torch.cat([windows[:2], recall[:2]]))
        assert torch.equal(seen["choose_variants"], seen["sensitivity"])
        assert torch.equal(seen["sensitivity"], torch.cat([windows[2:], recall[2:]]))
        assert torch.equal(seen["Evaluator"], windows[2:])
    else:
        assert torch.equal(seen["sensitivity"], torch.cat([windows, recall]))
        assert torch.equal(seen["Evaluator"], windows)


def test_too_few_windows(windows):
    model = tiny.model()
    with pytest.raises(ValueError, match="at least 3 calibration windows"):
        calibrate(model, windows[:2], plain_maps(model, [0]), bits=3)
