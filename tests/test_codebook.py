import pytest
import torch

from tq_ao.codebook import BITS, best_step, codebook, even_levels, gaussian_mse, lloyd_max

PAPER_MSE = {1: 0.363, 2: 0.1175, 3: 0.0345, 4: 0.0095}  # arXiv 2504.19874, theorem 1
# Max, "Quantizing for minimum distortion", 1960, table II: spacing and mean squared error of evenly spaced levels.
EVEN = {1: (1.596, 0.3634), 2: (0.9957, 0.1188), 3: (0.5860, 0.03744), 4: (0.3352, 0.01154)}


@pytest.mark.parametrize("bits", PAPER_MSE)
def test_lloyd_max_levels_have_the_distortion_of_the_paper(bits: int) -> None:
    assert gaussian_mse(lloyd_max(bits)) == pytest.approx(PAPER_MSE[bits], rel=5e-3)


def test_published_levels() -> None:
    assert lloyd_max(2) == pytest.approx((-1.5104, -0.4528, 0.4528, 1.5104), abs=1e-4)
    assert lloyd_max(3)[4:] == pytest.approx((0.2451, 0.7560, 1.3439, 2.1519), abs=1e-4)


@pytest.mark.parametrize("bits", EVEN)
def test_even_levels_are_the_published_ones(bits: int) -> None:
    step, mse = EVEN[bits]
    assert best_step(bits) == pytest.approx(step, rel=2e-4)
    assert gaussian_mse(even_levels(bits, best_step(bits))) == pytest.approx(mse, rel=1e-3)


@pytest.mark.parametrize("bits", EVEN)
def test_distortion_of_samples(bits: int, rng: torch.Generator) -> None:
    x = torch.randn(200_000, generator=rng)
    levels = codebook(bits).tensor() * codebook(bits).step
    nearest = levels[(x[:, None] - levels).abs().argmin(1)]
    assert (x - nearest).square().mean().item() == pytest.approx(EVEN[bits][1], rel=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_codes_around_zero(bits: int) -> None:
    levels = torch.tensor(codebook(bits).levels, dtype=torch.float64)
    if bits == 8:
        code = torch.arange(256, dtype=torch.uint8).view(torch.int8).double().clamp(min=-127)
        assert torch.allclose(levels * 127, code)
    else:
        assert torch.equal(levels, torch.arange(2.0**bits, dtype=torch.float64) - (2**bits - 1) / 2)


def test_errors_name_what_is_expected() -> None:
    with pytest.raises(ValueError, match=r"expected bits in \(1, 2, 3, 4, 8\), got 5"):
        codebook(5)
