import pytest
import torch

from tq_ao.codebook import BITS, ROLES
from tq_ao.packing import KEY_FLIP, TILE, from_fragments, pack, tile_bytes, to_fragments, unpack

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


def nibble(code: int, bits: int, role: str) -> tuple[int, int]:
    """Word s and nibble n of the code with index `code` in its group, from the table in packing.py."""
    if role == "key":
        i1, i0, jj, byte = code >> 4, code >> 3 & 1, code >> 2 & 1, code & 3
        return 2 * jj + i0, 2 * byte + i1
    m1, m0, j0, b1, b0 = (code >> k & 1 for k in (4, 3, 2, 1, 0))
    return (2 * j0 + b1, 4 * b0 + 2 * m0 + m1) if bits >= 3 else (2 * j0 + m0, 4 * b0 + 2 * b1 + m1)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_words_are_those_of_the_picture(bits: int, role: str, rng: torch.Generator) -> None:
    lane, group, head_dim = 13, 2, 128
    fragments = torch.zeros(32, head_dim, dtype=torch.int32)
    codes = torch.randint(0, 1 << bits, (32,), generator=rng).tolist()
    fragments[lane, 32 * group : 32 * group + 32] = torch.tensor(codes)
    words = pack(from_fragments(fragments[None], role)[0], bits, role).view(torch.int32)[0]
    want = [0] * bits
    for index, code in enumerate(codes):
        s, n = nibble(index, bits, role)
        if bits == 3:
            for w in range(3):
                want[w] |= (code << 1 if s == w else (code >> (2 - w) & 1) if s == 3 else 0) << (4 * n)
        else:
            want[s * bits // 4] |= code << (4 * n + s * bits % 4)
    for w in range(bits):
        flip = KEY_FLIP[bits][w] if role == "key" else 0
        got = int(words[(w * 32 + lane) * (head_dim // 32) + group]) & 0xFFFFFFFF
        assert got == want[w] ^ flip, (w, hex(got), hex(want[w]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_masked_byte_of_keys_is_its_level_times_a_power_of_two(bits: int, rng: torch.Generator) -> None:
    """What the tensor cores rely on: int8(byte & mask) = unit * (level + offset), unit and offset of the token tile."""
    codes = torch.randint(0, 1 << bits, (TILE, 32), generator=rng)
    words = pack(codes, bits, "key").view(torch.int32)[0].view(bits, 32)
    # token tile i: word of s = i0 (jj = 0), mask of the field, unit, level at zero
    width = {1: 0x01, 2: 0x03, 3: 0x0E, 4: 0x0F}[bits]
    for i in range(4):
        field = i % 2 * bits if bits < 3 else 0
        word = i % 2 if bits >= 3 else 0
        mask = width << (4 * (i // 2) + field)
        unit = (mask & -mask) if bits != 3 else 2 << (4 * (i // 2))
        bytes_ = (words[word].view(torch.uint8).view(32, 4) & mask).view(torch.int8).int()
        zero = 0 if mask >= 0x80 else -(2 ** (bits - 1))
        for lane in (0, 7, 31):
            g, t = divmod(lane, 4)
            got = bytes_[lane] // unit + zero
            assert got.tolist() == (codes[8 * i + g, 4 * t : 4 * t + 4] - 2 ** (bits - 1)).tolist()


@pytest.mark.parametrize("dim", [64, 128])
def test_fragment_order_is_that_of_the_tensor_core_operands(dim: int) -> None:
    index = torch.arange(TILE * dim).view(TILE, dim)
    key, value = to_fragments(index, "key"), to_fragments(index, "value")
    for lane in (0, 5, 31):
        g, t = divmod(lane, 4)
        key_want = [
            (8 * i + g) * dim + 32 * group + 16 * jj + 4 * t + byte
            for group in range(dim // 32) for i in range(4) for jj in range(2) for byte in range(4)
        ]  # fmt: skip
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
        unpack(torch.zeros(1, 100, dtype=torch.uint8), 3, 64, "key")
    with pytest.raises(ValueError, match="expected role"):
        to_fragments(torch.zeros(32, 64), "query")
