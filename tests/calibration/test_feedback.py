"""Maps for error feedback: the algebra of a pair, and less error than balanced maps by the codec itself."""

import pytest
import torch

from tq_ao.calibration import feedback
from tq_ao.calibration.feedback import fed_back
from tq_ao.calibration.symmetric import matrix_power, regularized
from tq_ao.calibration.transforms import balance
from tq_ao.reference import rounded
from tq_ao.rotation import in_one_part, rotations


def spread_moments(rng: torch.Generator, heads: int, dim: int, spread: float) -> torch.Tensor:
    """Second moments whose eigenvalues lie `spread` (standard deviation of the logarithm) apart."""
    basis = rotations("dense", heads, dim, int(torch.randint(2**31, (), generator=rng))).double()
    values = torch.exp(spread * torch.randn(heads, dim, 1, generator=rng, dtype=torch.float64))
    return basis.mT @ (values * basis)


@pytest.mark.parametrize("dim", [64, 96])
def test_without_noise_halves_cost_the_same_and_close_to_the_least(dim, rng, monkeypatch):
    monkeypatch.setattr(feedback, "NOISE", 0.0)
    monkeypatch.setattr(feedback, "TEMPER", 0.0)
    stored, reader = spread_moments(rng, 2, dim, 1.0), spread_moments(rng, 2, dim, 1.0)
    map, f = fed_back(stored, reader)
    inverse = torch.linalg.inv(map)
    metric = inverse @ regularized(reader) @ inverse.mT  # of an error e of mapped vectors: e @ metric @ e
    even, odd = metric[:, 0::2], metric[:, 1::2]
    e2, o2, eo = even[..., 0::2], odd[..., 1::2], even[..., 1::2]
    torch.testing.assert_close(f.double(), eo @ torch.linalg.inv(o2), atol=2e-2, rtol=0)  # rounded to bfloat16
    left = (e2 - eo @ torch.linalg.inv(o2) @ eo.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    odd_cost = o2.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(left, odd_cost, rtol=0.02, atol=0)
    half = matrix_power(regularized(stored), 0.5)
    mu = torch.linalg.eigvalsh(half @ regularized(reader) @ half)
    least = dim * mu.log().mean(-1).exp()
    assert ((left + odd_cost) / least < 1.05).all()
    assert (left + odd_cost < 0.8 * mu.sqrt().sum(-1) ** 2 / dim).all()
    variance = (map.mT @ regularized(stored) @ map).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance.mean(-1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (3, 0.7), (4, 0.7)])
def test_the_reader_hears_less_error_than_from_balanced_maps(bits, share, rng):
    dim = 64
    stored, reader = spread_moments(rng, 2, dim, 1.2), spread_moments(rng, 2, dim, 1.2)
    x = torch.randn(2, 4000, dim, generator=rng) @ matrix_power(stored, 0.5).float()
    q = torch.randn(2, 200, dim, generator=rng) @ matrix_power(reader, 0.5).float()

    def error(map, f=None):
        map, inverse = in_one_part(map)
        back = rounded((x @ map)[None], bits, f)[0] @ inverse
        return (q @ (back - x).mT).square().mean().item()

    balanced = error(balance(stored, reader) @ rotations("hadamard", 2, dim, 1).double())
    map, f = fed_back(stored, reader)
    assert torch.equal(f, f.bfloat16().float())
    assert error(map, f) < share * balanced
    assert error(map, f) < 0.8 * error(map)  # and it is the feedback that does it
