"""Keys with a large constant part (k_proj bias, as in Qwen2): plain rotations break, calibrated maps do not."""

import tiny
import torch

from tq_ao.calibration.calibrate import collect
from tq_ao.calibration.transforms import layer_maps
from tq_ao.evaluation.setup import plain_maps
from tq_ao.measure.capture import trace
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.simulate import LayerPlan, requantize


def uniform_kl(evaluate, maps):  # 4 bits: random weights are so sharp that 3 break them anyway
    return evaluate({i: LayerPlan(4, 4, m) for i, m in maps.items()}).kl


def test_a_planted_bias_breaks_plain_keys_only(rng):
    model = tiny.model("qwen2")
    windows = torch.randint(2, 97, (5, 200), generator=rng)
    plain = plain_maps(model, [0, 1, 2])
    common = {"window": 16, "sinks": 2}
    before = uniform_kl(Evaluator(model, windows[3:], **common), plain)
    with torch.no_grad():
        for layer in model.model.layers:
            # The slowest RoPE pair of each head turns least, so the bias stays almost constant in the cache.
            layer.self_attn.k_proj.bias.view(2, 32)[:, [15, 31]] = 300.0
            layer.self_attn.q_proj.weight.view(4, 32, -1)[:, [15, 31]] *= 0.01
            layer.self_attn.q_proj.bias.view(4, 32)[:, [15, 31]] = 0
    evaluate = Evaluator(model, windows[3:], **common)
    broken = uniform_kl(evaluate, plain)
    statistics = collect(model, windows[:3], [0, 1, 2], seed=0, **common)
    calibrated = {i: layer_maps(statistics[i], "attention-centred", "plain", seed=i) for i in plain}
    assert broken > 5 * before
    assert uniform_kl(evaluate, calibrated) < 1.5 * before


def test_maps_serve_the_positions_that_windows_stood_at(rng):
    """A constant part that RoPE turns by 3 radians in 3000 tokens: centred as at the beginning, errors triple there."""
    model = tiny.model("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(2, 32)[:, [12, 28]] = 60.0
    windows = torch.randint(2, 97, (4, 200), generator=rng)
    common = {"window": 16, "sinks": 2, "seed": 0}
    traces = trace(model, windows[3:], gradient=False, start=3000)
    variants, error = ("attention-centred", "attention-feedback"), {}
    for context in (0, 4000):
        statistics = collect(model, windows[:3], [0, 1, 2], context=context, **common)
        for variant in variants:
            error[context, variant] = 0.0
            for i, t in traces.items():  # of all layers: one alone varies by a third with the seed
                maps = layer_maps(statistics[i], variant, "plain", seed=0)
                k_hat = requantize(t.call.k, maps.key, maps.query.mT, maps.key_shift, 3, maps.key_feedback)
                q = t.call.q.unflatten(1, (2, -1)).flatten(2, 3)
                error[context, variant] += (q @ (k_hat - t.call.k).mT).square().mean().item()
    for variant in variants:
        assert error[4000, variant] < error[0, variant] / 2
