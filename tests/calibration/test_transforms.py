"""The closed form minimises what it says it minimises, and maps stay inverse to each other."""

import pytest
import torch

from tq_ao.calibration.statistics import LayerStatistics, Moments
from tq_ao.calibration.symmetric import regularized
from tq_ao.calibration.transforms import KEY_VARIANTS, VALUE_VARIANTS, balance, layer_maps


def random_moments(rng, heads=2, dim=32):
    factor = torch.randn(heads, dim, dim, generator=rng, dtype=torch.float64)
    scale = torch.exp(torch.randn(heads, dim, 1, generator=rng, dtype=torch.float64))
    return (factor * scale) @ (factor * scale).mT / dim


def statistics(rng, heads=2, dim=32, tokens=400):
    found = LayerStatistics()
    for what in ("q", "k", "v", "g"):
        mix = torch.randn(heads, dim, dim, generator=rng) / 4
        x = torch.randn(1, heads, tokens, dim, generator=rng) @ mix + torch.randn(heads, 1, dim, generator=rng)
        for weighting in ("tokens", "attention", "fisher"):
            found.add(what, weighting, x, torch.rand(1, heads, tokens, generator=rng))
    found.readout = random_moments(rng, heads, dim)
    return found


def expected_error(stored, reader, a):
    """tr(M^-1 reader) tr(M stored) with M = A A: [H]."""
    inverse = torch.linalg.inv(a)
    parts = (a @ stored @ a, inverse @ reader @ inverse)
    return torch.stack([x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in parts]).prod(0)


def test_balance_attains_the_least_expected_error(rng):
    stored, reader = random_moments(rng), random_moments(rng)
    ridge = 1e-9
    a = balance(stored, reader, ridge)
    values = torch.linalg.eigvals(stored @ reader).real.clamp_min(0).sqrt().sum(-1) ** 2
    best = expected_error(stored, reader, a)
    torch.testing.assert_close(best, values, rtol=1e-4, atol=0)
    assert (best < expected_error(stored, reader, torch.eye(32, dtype=a.dtype).expand_as(a))).all()
    for _ in range(20):
        other = a + 0.05 * random_moments(rng) * a.norm() / 32
        assert (expected_error(stored, reader, other) >= best * (1 - 1e-9)).all()


def test_regulariser_is_relative_to_the_mean_eigenvalue(rng):
    s = random_moments(rng)
    torch.testing.assert_close(regularized(s, 0.01), regularized(1e6 * s, 0.01))
    torch.testing.assert_close(
        regularized(s, 0.01).diagonal(dim1=-2, dim2=-1).mean(-1), torch.full((2,), 1.01, dtype=torch.float64)
    )


@pytest.mark.parametrize("key_variant", KEY_VARIANTS)
@pytest.mark.parametrize("value_variant", VALUE_VARIANTS)
def test_maps_of_every_variant_are_inverse_pairs(rng, key_variant, value_variant):
    maps = layer_maps(statistics(rng), key_variant, value_variant, seed=3)
    eye = torch.eye(32).expand(2, 32, 32)
    torch.testing.assert_close(maps.key @ maps.query.mT, eye, atol=2e-4, rtol=0)
    torch.testing.assert_close(maps.value @ maps.output, eye, atol=2e-4, rtol=0)
    assert maps.key_shift.any() == key_variant.endswith(("centred", "feedback"))
    assert maps.value_shift.any() == value_variant.endswith(("centred", "feedback"))
    assert (maps.key_feedback is None) != key_variant.endswith("feedback")
    assert (maps.value_feedback is None) != value_variant.endswith("feedback")


@pytest.mark.parametrize("variant", ["attention-typo", "fisher-metric-feedback", "Plain"])
def test_unknown_variants_are_refused(rng, variant):
    with pytest.raises(ValueError, match=f"expected a variant of key maps in .*got '{variant}'"):
        layer_maps(statistics(rng), variant, "plain", seed=0)
    with pytest.raises(ValueError, match=f"expected a variant of value maps in .*got '{variant}'"):
        layer_maps(statistics(rng), "plain", variant, seed=0)


def test_missing_statistics_say_what_was_collected(rng):
    found = LayerStatistics()
    found.add("k", "tokens", torch.randn(1, 2, 8, 32, generator=rng), torch.ones(1, 2, 8))
    with pytest.raises(ValueError, match=r"need 'attention' statistics of 'k'; collected: \['tokens'\]"):
        layer_maps(found, "attention", "plain", seed=0)


def test_moments_match_their_definition(rng):
    x, w = torch.randn(2, 3, 50, 32, generator=rng), torch.rand(2, 3, 50, generator=rng)
    m = Moments.zeros(3, 32, torch.device("cpu"))
    m.add(x[:1], w[:1])
    m.add(x[1:], w[1:])
    for h in range(3):
        flat, weight = x[:, h].reshape(-1, 32).double(), w[:, h].reshape(-1).double()
        mean = (weight[:, None] * flat).sum(0) / weight.sum()
        centred = flat - mean
        torch.testing.assert_close(m.mean()[h], mean, rtol=1e-4, atol=1e-5)
        want = (weight[:, None] * centred).mT @ centred / weight.sum()
        torch.testing.assert_close(m.covariance(True)[h], want, rtol=1e-3, atol=1e-4)
