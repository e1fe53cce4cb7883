"""The one-pass simulation reads packed copies exactly where decoding would, for every kind of attention."""

import layer_state
import pytest
import tiny
import torch

from tq_ao.calibration.gain import compensated, gain
from tq_ao.evaluation.setup import plain_maps
from tq_ao.measure.capture import exact, trace
from tq_ao.measure.simulate import LayerPlan, mixed_attention, requantize_layer
from tq_ao.reference import rounded


def slow(call, k_hat, v_hat, window, sinks):
    """One query at a time, in float64."""
    out = torch.empty_like(call.q, dtype=torch.float64)
    groups = call.q.shape[1] // call.k.shape[1]
    for i in range(call.q.shape[2]):
        low = 0 if call.sliding is None else max(0, i - call.sliding + 1)
        j = torch.arange(low, i + 1)
        old = ((i - j >= window) & (j >= sinks))[:, None]
        k, v = (
            torch.where(old, packed[:, :, low : i + 1], x[:, :, low : i + 1]).double().repeat_interleave(groups, 1)
            for packed, x in ((k_hat, call.k), (v_hat, call.v))
        )
        s = (call.q[:, :, i : i + 1].double() @ k.mT) * call.scaling
        if call.softcap:
            s = call.softcap * torch.tanh(s / call.softcap)
        if call.sink_logits is not None:
            s = torch.cat([s, call.sink_logits.double().view(1, -1, 1, 1).expand(s.shape[0], -1, 1, 1)], -1)
        out[:, :, i] = (torch.softmax(s, -1)[..., : len(j)] @ v)[:, :, 0]
    return out


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("block", [16, 37, 512])
@pytest.mark.parametrize(("window", "sinks"), [(12, 3), (1, 0), (50, 4)])
def test_mixed_attention_equals_token_by_token(kind, block, window, sinks, rng):
    ids = torch.randint(2, 97, (2, 70), generator=rng)
    for layer, t in trace(tiny.model(kind), ids, gradient=False).items():
        noise = [x + torch.randn(x.shape, generator=rng) * 0.3 * x.std() for x in (t.call.k, t.call.v)]
        got = mixed_attention(t.call, *noise, window=window, sinks=sinks, block=block)
        torch.testing.assert_close(got.double(), slow(t.call, *noise, window, sinks), atol=2e-4, rtol=1e-3), layer


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_nothing_changes_while_the_window_covers_everything(kind, rng):
    ids = torch.randint(2, 97, (1, 40), generator=rng)
    for t in trace(tiny.model(kind), ids, gradient=False).values():
        garbage = torch.full_like(t.call.k, 7.0)
        got = mixed_attention(t.call, garbage, garbage, window=40, sinks=0)
        torch.testing.assert_close(got, exact(t.call), atol=1e-4, rtol=1e-3)


def test_gain_makes_the_levels_of_a_gaussian_as_long_as_the_vector(rng):
    x = torch.randn(1, 2, 4000, 32, generator=rng)
    plain = plain_maps(tiny.model(), [0])[0]
    for bits in (1, 2, 3, 4):
        maps = compensated(plain, bits, bits)
        _, v_hat = requantize_layer(x, x, LayerPlan(bits, bits, maps))
        slope = (v_hat * x).sum() / x.square().sum()
        assert slope.item() == pytest.approx(1.0, abs=0.03)
        assert 1 < gain(bits, "key") < gain(bits, "value")
    assert gain(8, "value") == gain(16, "key") == 1


def test_each_side_is_requantized_with_its_own_feedback(rng):
    maps = layer_state.maps(2, 32, rng, feedback=True)
    k, v = (torch.randn(1, 2, 50, 32, generator=rng) for _ in range(2))
    k_hat, v_hat = requantize_layer(k, v, LayerPlan(3, 2, maps))
    y = rounded((k - maps.key_shift[:, None]) @ maps.key, 3, maps.key_feedback)
    torch.testing.assert_close(k_hat, y @ maps.query.mT + maps.key_shift[:, None])
    y = rounded((v - maps.value_shift[:, None]) @ maps.value, 2, maps.value_feedback)
    torch.testing.assert_close(v_hat, y @ maps.output + maps.value_shift[:, None])
