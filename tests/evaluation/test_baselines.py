"""The baselines round as the methods they stand for do, and read what decoding with them would read."""

import pytest
import tiny
import torch
from transformers.cache_utils import QuantizedLayer

from tq_ao.codebook import gaussian_mse, lloyd_max
from tq_ao.evaluation.lloyd import lloyd, lloyd_max_rounded
from tq_ao.evaluation.setup import plain_maps
from tq_ao.evaluation.transformers_cache import (
    BITS,
    KINDS,
    quantized_cache,
    reads,
    stored_bits,
    transformers_quantized,
    unavailable,
)
from tq_ao.measure.capture import exact, intercept, trace

PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_rounding_is_nearest_and_least_squares(bits, rng):
    y = torch.randn(5000, 128, generator=rng) * torch.rand(5000, 1, generator=rng) * 9
    seen = lloyd_max_rounded(y, bits)
    error = ((seen - y).square().sum(-1) / y.square().sum(-1)).mean().item()
    theory = gaussian_mse(lloyd_max(bits))  # 128 numbers of given length have shorter tails: 1 to 4 % less
    assert 0.93 * theory < error < 1.01 * theory
    unit = y.double() / y.double().square().mean(-1, keepdim=True).sqrt()
    levels = torch.tensor(lloyd_max(bits), dtype=torch.float64)
    distance = (unit.unsqueeze(-1) - levels).abs()

    def least_squares(level):
        return (y * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)

    # In single precision a number half way between two levels may take either, so which it took is read from `seen`.
    scale = least_squares(levels[distance.argmin(-1)])
    chosen = ((seen / scale).unsqueeze(-1) - levels).abs().argmin(-1)
    assert (distance.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) <= distance.amin(-1) + 1e-5).all()
    level = levels[chosen]
    torch.testing.assert_close(seen.double(), level * least_squares(level), rtol=6e-4, atol=1e-5)


def test_lloyd_max_reads_old_tokens_rounded_and_recent_ones_exactly(rng):
    model = tiny.model()
    t = trace(model, torch.randint(2, 97, (1, 60), generator=rng), gradient=False)[1]
    maps = {1: plain_maps(model, [1])[1]}
    got = lloyd(maps, 4, window=20, sinks=2)(t.call)
    torch.testing.assert_close(got[:, :, :20], t.out[:, :, :20], atol=1e-4, rtol=1e-3)
    change = [(lloyd(maps, b, window=20, sinks=2)(t.call) - t.out)[:, :, 22:].square().mean().item() for b in (1, 4)]
    assert 0 < change[1] < change[0] / 5
    torch.testing.assert_close(lloyd({}, 1, window=20, sinks=2)(t.call), exact(t.call))


class Drifting(QuantizedLayer):
    """Loses something each time it rounds, so that tokens rounded once and twice differ."""

    def _quantize(self, tensor, axis):
        return (tensor * 4).floor() / 4 - 0.01

    def _dequantize(self, qtensor):
        return qtensor


@pytest.mark.parametrize("tokens", [5, 16, 33, 50])
def test_blocks_read_what_single_tokens_read(tokens, rng):
    k, v = torch.randn(2, 1, 2, tokens, 8, generator=rng)
    layer, window = Drifting(residual_length=8), 8
    single = [layer.update(k[:, :, :window], v[:, :, :window])] * min(window, tokens)
    single += [layer.update(k[:, :, i : i + 1], v[:, :, i : i + 1]) for i in range(window, tokens)]
    seen = 0
    for first, end, keys, values in reads(Drifting(residual_length=8), k, v, window):
        assert first == seen
        for i in range(first, end):
            for block, one in zip((keys, values), single[i], strict=True):
                torch.testing.assert_close(block[:, :, : i + 1], one[:, :, : i + 1], rtol=0, atol=0)
        seen = end
    assert seen == tokens


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_simulated_logits_are_those_of_the_cache(kind, bits, rng):
    pytest.importorskip(PACKAGES[kind.backend], reason=f"{kind.backend} is optional")
    model = tiny.model(head_dim=64)
    ids, window = torch.randint(2, 97, (1, 100), generator=rng), 32
    cache = quantized_cache(model.config, kind, bits, window)
    with torch.no_grad():
        want = [model(ids[:, :window], **{tiny.CACHE: cache}).logits]
        want += [model(ids[:, i : i + 1], **{tiny.CACHE: cache}).logits for i in range(window, ids.shape[1])]
        with intercept(model, transformers_quantized(model.config, {0, 1, 2}, kind, bits, window=window)):
            got = model(ids, use_cache=False).logits
        plain = model(ids, use_cache=False).logits
    want = torch.cat(want, 1)
    error = (got - want).abs().mean()
    assert error < 0.05 * (plain - want)[:, window:].abs().mean()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_stored_bits_are_those_of_the_tensors_held(kind, bits, rng):
    pytest.importorskip(PACKAGES[kind.backend], reason=f"{kind.backend} is optional")
    layer = quantized_cache(tiny.config("llama", head_dim=64), kind, bits, 16).layers[0]
    k = torch.randn(1, 2, 256, 64, generator=rng).bfloat16()
    layer.update(k, k)
    held = 8 * sum(t.numel() * t.element_size() for t in tensors(layer._quantized_keys))
    assert held / k.numel() == stored_bits(bits)


def tensors(held):
    """Plain tensors inside what a backend keeps."""
    if isinstance(held, torch.Tensor) and hasattr(held, "__tensor_flatten__"):
        held = [getattr(held, name) for name in held.__tensor_flatten__()[0]]
    if isinstance(held, torch.Tensor):
        return [held]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else []
    return [t for part in parts for t in tensors(part)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reason_without_the_package(kind, monkeypatch):
    config = tiny.config("llama")
    installed = {"quanto": "is_optimum_quanto_available", "hqq": "is_hqq_available"}[kind.backend]
    monkeypatch.setattr(f"transformers.cache_utils.{installed}", lambda: False)
    assert "pip install" in unavailable(config, kind, 32)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_reason_for_models_transformers_refuses(kind):
    assert "sliding_attention" in unavailable(tiny.config("gemma3"), kind, 32)


def test_reason_for_tokens_that_fill_no_group():
    pytest.importorskip("optimum.quanto", reason="quanto is optional")
    kind = KINDS["transformers quanto, keys per channel"]
    assert "groups of 64" in unavailable(tiny.config("llama"), kind, 16)
    assert unavailable(tiny.config("llama"), kind, 32) is None
