"""Reconstruction levels: evenly spaced, as far apart as a normal distribution wants them.

A rotated, normalised coordinate is close to N(0, 1) (Zandieh et al., arXiv 2504.19874, section 3).  The paper takes
the Lloyd-Max levels of that distribution; the levels here are the best *evenly spaced* ones (Max, "Quantizing for
minimum distortion", 1960, table II).  Mean squared error is 0 / 1 / 8 / 21 % larger at 1 / 2 / 3 / 4 bits, and in
return a code is its own level: a bit field cut out of a packed word by one AND is an integer the tensor cores multiply,
where uneven levels need a look-up for every code and, for values, a conversion (docs/kernels.md).

    level[code] = code - (2**bits - 1) / 2           1 to 4 bits: ..., -1.5, -0.5, 0.5, 1.5, ...
    level[code] = code / 127                         8 bits, codes are two's complement, -127 .. 127

The scale stored with a vector is in units of the level spacing, so readers never see `step`.
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
    """Levels of one bit width.

    Attributes:
        bits: code width, one of `BITS`.
        levels: 2**bits levels, indexed by code; ascending, at 8 bits read as two's complement.
        step: distance of neighbouring levels in standard deviations of the vector when codes are chosen; at 8 bits in
            units of its largest entry.
    """

    bits: int
    levels: tuple[float, ...]
    step: float

    def tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Levels as a float32 tensor [2**bits], indexed by code."""
        device = torch.device(device or "cpu")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        with torch.inference_mode(False):  # an inference tensor could not be used in a later graph
            return _levels_tensor(self.bits, device)


def _pdf(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def _cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@lru_cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2**bits Lloyd-Max levels of N(0, 1), ascending (Max 1960, Lloyd 1982), to about 1e-12: the paper's levels."""
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


def even_levels(bits: int, step: float = 1.0) -> tuple[float, ...]:
    """2**bits levels around zero, `step` apart, ascending."""
    return tuple(step * (code - ((1 << bits) - 1) / 2) for code in range(1 << bits))


@lru_cache
def best_step(bits: int) -> float:
    """The spacing with the least `gaussian_mse` (which has one minimum): golden-section search to about 1e-8."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.1, 3.0
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if gaussian_mse(even_levels(bits, a)) < gaussian_mse(even_levels(bits, b)):
            high = b
        else:
            low = a
    return (low + high) / 2


@lru_cache
def codebook(bits: int) -> Codebook:
    """The codebook of a bit width.

    Raises:
        ValueError: unsupported bits.
    """
    if bits not in BITS:
        raise ValueError(f"expected bits in {BITS}, got {bits!r}; choose one of those widths")
    if bits == 8:
        signed = (c - 256 if c > 127 else c for c in range(256))
        return Codebook(8, tuple(max(c, -127) / 127 for c in signed), 1 / 127)
    return Codebook(bits, even_levels(bits), best_step(bits))


@lru_cache
def _levels_tensor(bits: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(codebook(bits).levels, dtype=torch.float32, device=device)
