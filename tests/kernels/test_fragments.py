"""The PTX that unpacks operands, executed instruction by instruction: registers hold levels times a unit."""

import re

import pytest
import torch

from tq_ao.packing import TILE, pack

BITS = (1, 2, 3, 4)
DIM, LANES = 64, (0, 13, 31)


def execute(assembly: str, words: list[int], results: int) -> list[int]:
    """Registers $0 .. $results - 1 after the PTX has run on `words`, which follow them."""
    registers = {f"${results + i}": word for i, word in enumerate(words)}
    operations = {
        "and": lambda a, b: a & b,
        "shl": lambda a, n: a << n,
        "shr": lambda a, n: a >> n,
        "lop3": lambda a, b, c, table: a & b | ~a & c if table == 0xCA else None,
    }
    for operation, target, arguments in re.findall(r"^(\w+)\.b32 (\S+), (.*);$", assembly, re.MULTILINE):
        values = [registers[x] if x in registers else int(x, 0) for x in arguments.split(", ")]
        registers[target] = operations[operation](*values) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(results)]


def packed_words(codes: torch.Tensor, bits: int, role: str) -> torch.Tensor:
    """[bits, 32 lanes, groups]"""
    return pack(codes, bits, role).view(torch.int32)[0].view(bits, 32, DIM // 32)


def words_of(words: torch.Tensor, lane: int, group: int) -> list[int]:
    return [int(w) & 0xFFFFFFFF for w in words[:, lane, group]]


@pytest.mark.parametrize("bits", BITS)
def test_keys(bits: int, rng: torch.Generator) -> None:
    fragments = pytest.importorskip("tq_ao.kernels.fragments")
    codes = torch.randint(0, 1 << bits, (TILE, DIM), generator=rng)
    words, units, starts = packed_words(codes, bits, "key"), fragments.units(bits), fragments.double_starts(bits)
    for lane in LANES:
        g, t = divmod(lane, 4)
        for group in range(DIM // 32):
            out = execute(fragments.key_asm(bits), words_of(words, lane, group), 8)
            for i in range(4):
                for jj in range(2):
                    got = torch.tensor([out[2 * i + jj] >> (8 * b) & 255 for b in range(4)], dtype=torch.uint8)
                    levels = (got.view(torch.int8) + starts[i] / 2) / units[i]
                    first = 32 * group + 16 * jj + 4 * t
                    want = codes[8 * i + g, first : first + 4] - (2**bits - 1) / 2
                    assert torch.equal(levels, want), (i, jj, lane)


@pytest.mark.parametrize("bits", BITS)
def test_values(bits: int, rng: torch.Generator) -> None:
    fragments = pytest.importorskip("tq_ao.kernels.fragments")
    codes = torch.randint(0, 1 << bits, (TILE, DIM), generator=rng)
    words, units = packed_words(codes, bits, "value"), fragments.units(bits)
    for lane in LANES:
        g, t = divmod(lane, 4)
        for group in range(DIM // 32):
            out = execute(fragments.value_asm(bits), words_of(words, lane, group), 16)
            for m in range(4):
                for j0 in range(2):
                    for b1 in range(2):
                        register = out[2 * (2 * m + j0) + b1]
                        halves = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.int16)
                        number = halves.view(torch.float16).double() * 2.0**24 / units[m]
                        token = 16 * j0 + 8 * b1 + 2 * t
                        assert torch.equal(number, codes[token : token + 2, 32 * group + 8 * m + g].double())
