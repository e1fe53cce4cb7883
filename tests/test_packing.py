import pytest
import torch

from tq_ao.codebook import BITS, ROLES
from tq_ao.packing import TILE, from_fragments, pack, tile_bytes, to_fragments, unpack, unpack_fragments

DIMS = (32, 64, 96, 128, 160, 256)


def random_codes(bits: int, dim: int, rng: torch.Generator, tiles: int = 3) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (2, 2, tiles * TILE, dim), generator=rng, dtype=torch.int32)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_round_trip_is_exact(bits: int, dim: int, role: str, rng: torch.Generator) -> None:
    codes = random_codes(bits, dim, rng)
    packed = pack(codes, bits, role)
    assert packed.shape == (2, 2, 3, tile_bytes(bits, dim))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, dim, role), codes)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_unpacking_covers_every_bit(bits: int, dim: int, rng: torch.Generator) -> None:
    packed = torch.randint(0, 256, (5, tile_bytes(bits, dim)), generator=rng, dtype=torch.uint8)
    for role in ROLES:
        assert torch.equal(pack(unpack(packed, bits, dim, role), bits, role), packed)


def test_fifty_bytes_per_vector_at_three_bits_and_dim_128(rng: torch.Generator) -> None:
    tokens = 4 * TILE
    packed = pack(random_codes(3, 128, rng, 4)[0, 0], 3, "key")
    scales = torch.zeros(4, TILE, dtype=torch.float16)
    assert packed.untyped_storage().nbytes() + scales.untyped_storage().nbytes() == 50 * tokens


def test_three_bit_words_are_those_of_the_picture() -> None:
    lane, group, head_dim = 13, 2, 128
    fragments = torch.zeros(32, head_dim, dtype=torch.int32)
    fragments[lane, 32 * group : 32 * group + 32] = torch.arange(32) % 8
    words = pack(from_fragments(fragments[None], "value")[0], 3, "value").view(torch.int32)[0]
    q = torch.arange(32) % 8
    for w in range(3):
        want = sum(int(q[8 * w + n]) << (4 * n) for n in range(8))
        want |= sum(((int(q[24 + n]) >> w) & 1) << (4 * n + 3) for n in range(8))
        got = int(words[(w * 32 + lane) * (head_dim // 32) + group]) & 0xFFFFFFFF
        assert got == want, (w, hex(got), hex(want))
    assert int((words != 0).sum()) == 3


@pytest.mark.parametrize("dim", [64, 128])
def test_fragment_order_is_that_of_the_tensor_core_operands(dim: int) -> None:
    index = torch.arange(TILE * dim).view(TILE, dim)
    key, value = to_fragments(index, "key"), to_fragments(index, "value")
    for lane in (0, 5, 31):
        g, t = divmod(lane, 4)
        key_want = [
            (8 * i + g) * dim + 16 * j + 4 * t + byte for i in range(4) for j in range(dim // 16) for byte in range(4)
        ]
        value_want = [
            (16 * j0 + 8 * b1 + 2 * t + b0) * dim + 8 * m + g
            for m in range(dim // 8) for j0 in range(2) for b1 in range(2) for b0 in range(2)
        ]  # fmt: skip
        assert key[lane].tolist() == key_want
        assert value[lane].tolist() == value_want


def test_strided_input_packs_like_contiguous(rng: torch.Generator) -> None:
    codes = random_codes(2, 64, rng)
    assert torch.equal(pack(codes.mT.contiguous().mT, 2, "key"), pack(codes, 2, "key"))


def test_errors() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 80"):
        tile_bytes(3, 80)
    with pytest.raises(ValueError, match="expected bits"):
        tile_bytes(5, 64)
    with pytest.raises(ValueError, match="expected a multiple of 32 tokens, got 33"):
        pack(torch.zeros(33, 64, dtype=torch.int32), 3, "key")
    with pytest.raises(ValueError, match="expected 768 bytes per tile"):
        unpack_fragments(torch.zeros(1, 100, dtype=torch.uint8), 3, 64)
    with pytest.raises(ValueError, match="expected role"):
        to_fragments(torch.zeros(32, 64), "query")
