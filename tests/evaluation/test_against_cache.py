"""The simulation predicts the real cache, calibrated maps, shifts and gains included."""

import pytest
import tiny
import torch

from tq_ao import hf
from tq_ao.cache import TurboQuantCache
from tq_ao.calibration.calibrate import calibrate
from tq_ao.config import TurboQuantConfig
from tq_ao.evaluation.decode_kl import evaluate_caches
from tq_ao.evaluation.setup import plain_maps
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.metrics import SKIP
from tq_ao.measure.simulate import LayerPlan


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_simulated_kl_is_that_of_the_cache(kind, rng):
    model = tiny.model(kind)
    if kind == "qwen2":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.k_proj.bias.add_(3 * torch.randn(layer.self_attn.k_proj.bias.shape, generator=rng))
    text = torch.randint(2, 97, (5, 260), generator=rng)
    plain = plain_maps(model, [0, 1, 2])
    result = calibrate(model, text[:3], plain, bits=2.0, window=16, sinks=4, maps="auto")
    simulated = Evaluator(model, text[3:], window=32, sinks=4)
    want = simulated({i: LayerPlan(*pair, result.maps[i]) for i, pair in result.schedule.items()})
    config = TurboQuantConfig.from_schedule(result.schedule, window=16, sinks=4, num_layers=3, head_dim=32)
    hf.attach(model, config, result.maps)
    maps = model.turboquant.maps
    found = evaluate_caches(model, text[3:], {"ours": lambda: TurboQuantCache(model.config, config, maps)})["ours"]
    assert 0.7 * want.kl < found.kl < 1.4 * want.kl
    assert (found.tokens, found.chunks) == (want.tokens, want.chunks) == (2 * (260 - SKIP), 2)
    with pytest.raises(ValueError, match="more than 64 tokens"):
        evaluate_caches(model, text[:, :64], {"ours": lambda: TurboQuantCache(model.config, config, maps)})
