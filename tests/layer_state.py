"""A layer's cache as the list of tensors that `reference.append_` and the kernels take, and random maps for it."""

import torch

from tq_ao import ops, reference
from tq_ao.packing import TILE, tile_bytes, unpack
from tq_ao.rotation import LayerMaps, rotations

SCALE_ULPS = 2e-3  # two fp16 ulps


def empty_cache(
    batch: int = 2, heads: int = 2, dim: int = 64, tokens: int = 256, k_bits: int = 3, v_bits: int = 4,
    sinks: int = 4, window: int = 32, capacity: int | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:  # fmt: skip
    """k_codes, k_scales, v_codes, v_scales, k_sinks, v_sinks, k_recent, v_recent; packed parts poisoned."""
    tiles = -(-tokens // TILE)
    ring = window + 2 * TILE if capacity is None else capacity
    state: list[torch.Tensor] = []
    for bits in (k_bits, v_bits):
        state.append(torch.full((batch, heads, tiles, tile_bytes(bits, dim)), 0xFF, dtype=torch.uint8, device=device))
        state.append(torch.full((batch, heads, tiles, TILE), torch.nan, dtype=torch.float16, device=device))
    for slots in (sinks, sinks, ring, ring):
        state.append(torch.zeros(batch, heads, slots, dim, dtype=dtype, device=device))
    return state


def _feedback(heads: int, half: int, rng: torch.Generator) -> torch.Tensor:
    """A random feedback matrix, large enough to change many codes, in numbers that bfloat16 has."""
    noise = torch.randn(heads, half, half, generator=rng) * (0.3 / half**0.5)
    return (0.7 * torch.eye(half) + noise).bfloat16().float()


def maps(heads: int, dim: int, rng: torch.Generator, feedback: bool = False) -> LayerMaps:
    """Dense rotations with a mild stretch, so that key and query (value and output) maps differ, and small shifts.

    feedback: with random feedback matrices, of keys and of values.
    """
    r = rotations("dense", heads, dim, int(torch.randint(2**31, (), generator=rng)))
    stretch = 0.5 + torch.rand(heads, 1, dim, generator=rng)
    shift = torch.randn(2, heads, dim, generator=rng) / 4
    inverse = (r / stretch).contiguous()
    forward = (r * stretch).contiguous()
    return LayerMaps(
        key=forward,
        query=inverse,
        value=forward,
        output=inverse.mT.contiguous(),
        key_shift=shift[0],
        value_shift=shift[1],
        key_feedback=_feedback(heads, dim // 2, rng) if feedback else None,
        value_feedback=_feedback(heads, dim // 2, rng) if feedback else None,
    )


def with_operands(maps: LayerMaps) -> list[torch.Tensor]:
    """The maps' tensors, and what kernels on a GPU keep of them."""
    key = ops.prepare(maps.key, maps.key_shift, "key", feedback=maps.key_feedback)
    value = ops.prepare(maps.value, maps.value_shift, "value", feedback=maps.value_feedback)
    return [*maps.tensors().values(), key, value]


def tokens(
    batch: int, heads: int, count: int, dim: int, rng: torch.Generator, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Random [B, H, N, D] with the strides models hand over: a view of [B, N, H, D]."""
    return torch.randn(batch, count, heads, dim, generator=rng).to(dtype).transpose(1, 2)


def assert_same_tiles(got, want, dim: int, role: str, allowed: float = 1e-3, feedback: bool = False) -> None:
    """Codes equal but for the fraction `allowed`; scales of vectors whose codes agree within two ulps.

    feedback: an even dim's code that differs changes odd ones of its vector, which do not count then.
    """
    bits = reference.bits_of(want[0], dim)
    a, b = (unpack(x[0].cpu(), bits, dim, role) for x in (got, want))
    differ = a != b
    if feedback:
        differ[..., 1::2] &= ~differ[..., 0::2].any(-1, keepdim=True)
    fraction = differ.float().mean().item()
    assert fraction <= (allowed if bits < 8 else 2 * allowed), f"{fraction:.1e} of the codes differ"
    same = ~differ.any(-1)
    s, t = (x[1].cpu().flatten(-2).float()[same] for x in (got, want))
    assert torch.allclose(s, t, rtol=SCALE_ULPS, atol=1e-7, equal_nan=True)
