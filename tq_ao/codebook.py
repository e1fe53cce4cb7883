"""Reconstruction levels: Lloyd-Max quantisers of N(0, 1), rounded to the grid the kernels compute on.

A rotated, normalised coordinate is close to N(0, 1) (Zandieh et al., arXiv 2504.19874, section 3), so the
MSE-optimal scalar levels are Lloyd-Max levels of the normal distribution.  Tensor cores do not multiply
those reals: key levels feed an int8 matrix product and value levels are stored as e4m3 (or, at 8 bits,
int8) bytes.  A codebook is therefore a table of grid bytes plus one real `unit`:

    level[code] = (grid[code] + offset) / unit

`offset` is 0.5 for 4-bit keys (their table is 8 magnitudes; the negative level is the bitwise complement,
which lands on -(g + 0.5) - 0.5) and 0 elsewhere.  Encoders choose codes against these exact levels, so
the reference and the kernels agree to rounding and the grid costs nothing measurable.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Role = Literal["key", "value"]
ROLES: tuple[Role, ...] = ("key", "value")
BITS: tuple[int, ...] = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Codebook:
    """Levels of one bit width and role.

    Attributes:
        bits: code width, one of `BITS`.
        role: "key" (int8 grid) or "value" (e4m3 grid; int8 at 8 bits).
        levels: 2**bits reconstruction levels, indexed by code (ascending for 1-3 bits and 8 bits read as
            two's complement; sign-magnitude at 4 bits: codes 0-7 positive ascending, 8-15 their negatives).
        table: the bytes a kernel looks codes up in: 2**bits entries, the 8 magnitudes at 4 bits, and
            empty at 8 bits, where the code is the byte.
        unit: grid units per standard deviation: level = (grid + offset) / unit.
        offset: added to the grid value of every code before dividing by `unit`.
    """

    bits: int
    role: Role
    levels: tuple[float, ...]
    table: tuple[int, ...]
    unit: float
    offset: float = 0.0

    def tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Levels as a float32 tensor [2**bits], indexed by code."""
        return _levels_tensor(self.bits, self.role, torch.device(device or "cpu"))


def _pdf(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def _cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@lru_cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2**bits Lloyd-Max levels of N(0, 1), ascending (Max 1960, Lloyd 1982), to about 1e-12."""
    n = 1 << (bits - 1)
    levels = [(2 * i + 1) * 3.0 / (2 * n) for i in range(n)]
    for _ in range(20_000):
        edges = [0.0] + [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)] + [math.inf]
        new = [(_pdf(a) - _pdf(b)) / (_cdf(b) - _cdf(a)) for a, b in zip(edges, edges[1:], strict=False)]
        done = max(abs(a - b) for a, b in zip(new, levels, strict=True)) < 1e-13
        levels = new
        if done:
            break
    return tuple([-x for x in reversed(levels)] + levels)


def gaussian_mse(levels: tuple[float, ...]) -> float:
    """E[(x - nearest level)**2] for x ~ N(0, 1), in closed form."""
    ordered = sorted(levels)
    edges = [-math.inf] + [(a + b) / 2 for a, b in zip(ordered, ordered[1:], strict=False)] + [math.inf]
    total = 1.0
    for level, a, b in zip(ordered, edges, edges[1:], strict=False):
        mass, first = _cdf(b) - _cdf(a), _pdf(a) - _pdf(b)
        total += level * level * mass - 2 * level * first
    return total


def _e4m3(x: float) -> tuple[float, int]:
    byte = torch.tensor(x).to(torch.float8_e4m3fn)
    return float(byte.float()), int(byte.view(torch.uint8))


@lru_cache
def _value_unit(bits: int) -> float:
    """The free scale in [1, 2) that loses least when positive Lloyd-Max levels are rounded to e4m3."""
    positive = lloyd_max(bits)[1 << (bits - 1) :]

    def loss(unit: float) -> float:
        grid = [_e4m3(x * unit)[0] / unit for x in positive]
        return gaussian_mse(tuple([-x for x in grid] + grid))

    return min((1 + i / 512 for i in range(512)), key=loss)


@lru_cache
def codebook(bits: int, role: Role) -> Codebook:
    """The codebook of a bit width and role.

    Raises:
        ValueError: unsupported bits or role.
    """
    if bits not in BITS:
        raise ValueError(f"expected bits in {BITS}, got {bits!r}; choose one of those widths")
    if role not in ROLES:
        raise ValueError(f"expected role in {ROLES}, got {role!r}; keys and values are laid out differently")
    if bits == 8:
        signed = [c - 256 if c > 127 else c for c in range(256)]
        return Codebook(8, role, tuple(max(c, -127) / 127 for c in signed), (), 127.0)
    positive = lloyd_max(bits)[1 << (bits - 1) :]
    if role == "value":
        unit, offset = _value_unit(bits), 0.0
        half = [_e4m3(x * unit) for x in positive]
        magnitudes, low = [h[0] for h in half], [h[1] for h in half]
        high = [byte | 0x80 for byte in low]
    else:
        offset = 0.5 if bits == 4 else 0.0
        unit = (127 + offset) / positive[-1]
        grid = [round(x * unit - offset) for x in positive]
        magnitudes, low, high = [g + offset for g in grid], grid, [-g & 0xFF for g in grid]
    real = [m / unit for m in magnitudes]
    if bits == 4:
        return Codebook(4, role, tuple(real + [-x for x in real]), tuple(low), unit, offset)
    return Codebook(bits, role, tuple([-x for x in reversed(real)] + real), tuple(high[::-1] + low), unit, offset)


@lru_cache
def _levels_tensor(bits: int, role: Role, device: torch.device) -> torch.Tensor:
    return torch.tensor(codebook(bits, role).levels, dtype=torch.float32, device=device)
