import pytest
import torch

from tq_ao.codebook import BITS, ROLES, codebook, gaussian_mse, lloyd_max

PAPER_MSE = {1: 0.363, 2: 0.1175, 3: 0.0345, 4: 0.0095}  # arXiv 2504.19874, theorem 1


@pytest.mark.parametrize("bits", PAPER_MSE)
def test_lloyd_max_levels_have_the_distortion_of_the_paper(bits: int) -> None:
    assert gaussian_mse(lloyd_max(bits)) == pytest.approx(PAPER_MSE[bits], rel=5e-3)


def test_published_levels() -> None:
    assert lloyd_max(2) == pytest.approx((-1.5104, -0.4528, 0.4528, 1.5104), abs=1e-4)
    assert lloyd_max(3)[4:] == pytest.approx((0.2451, 0.7560, 1.3439, 2.1519), abs=1e-4)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", PAPER_MSE)
def test_the_grid_costs_almost_nothing(bits: int, role: str) -> None:
    assert gaussian_mse(codebook(bits, role).levels) <= 1.01 * gaussian_mse(lloyd_max(bits))


@pytest.mark.parametrize("bits", PAPER_MSE)
def test_distortion_of_samples(bits: int, rng: torch.Generator) -> None:
    x = torch.randn(200_000, generator=rng)
    levels = codebook(bits, "key").tensor()
    nearest = levels[(x[:, None] - levels).abs().argmin(1)]
    assert (x - nearest).square().mean().item() == pytest.approx(PAPER_MSE[bits], rel=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_key_levels_are_int8_and_value_levels_e4m3(bits: int) -> None:
    key, value = codebook(bits, "key"), codebook(bits, "value")
    grid = torch.tensor(key.levels, dtype=torch.float64) * key.unit - key.offset * torch.tensor(key.levels).sign()
    assert torch.allclose(grid, grid.round(), atol=1e-9)
    assert grid.abs().max() < 127.5
    if bits < 8:
        grid = torch.tensor(value.levels, dtype=torch.float64) * value.unit
        assert torch.allclose(grid.float().to(torch.float8_e4m3fn).double(), grid, atol=1e-9)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [b for b in BITS if b < 8])
def test_table_bytes_decode_to_the_levels(bits: int, role: str) -> None:
    book = codebook(bits, role)
    table = torch.tensor(book.table, dtype=torch.uint8)
    grid = table.view(torch.int8).double() if role == "key" else table.view(torch.float8_e4m3fn).double()
    if bits == 4:
        grid = torch.cat([grid, -grid - 2 * book.offset])  # codes 8..15 are the bitwise complement
    assert torch.allclose((grid + book.offset) / book.unit, torch.tensor(book.levels, dtype=torch.float64))


def test_four_bits_are_sign_and_magnitude_the_others_ascend() -> None:
    for role in ROLES:
        four = torch.tensor(codebook(4, role).levels)
        assert torch.equal(four[8:], -four[:8])
        assert (four[:8].diff() > 0).all()
        for bits in (1, 2, 3):
            assert (torch.tensor(codebook(bits, role).levels).diff() > 0).all()


def test_errors_name_what_is_expected() -> None:
    with pytest.raises(ValueError, match=r"expected bits in \(1, 2, 3, 4, 8\), got 5"):
        codebook(5, "key")
    with pytest.raises(ValueError, match=r"expected role in \('key', 'value'\), got 'query'"):
        codebook(3, "query")
