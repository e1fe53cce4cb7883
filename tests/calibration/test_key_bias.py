"""Keys with a large constant part (k_proj bias, as in Qwen2): plain rotations break, calibrated maps do not."""

import tiny
import torch

from tq_ao.calibration.calibrate import collect
from tq_ao.calibration.transforms import layer_maps
from tq_ao.evaluation.evaluator import Evaluator
from tq_ao.evaluation.setup import plain_maps
from tq_ao.evaluation.simulate import LayerPlan


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
