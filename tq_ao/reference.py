"""The codec and attention over packed K and V in plain torch: what the kernels must equal.

Geometry of a layer's cache (every function here and every kernel agrees on it).  Row b of the batch has
n = length - start[b] tokens, counted from its first real token: left padding is never stored, so a padded
row's cache is byte for byte that of its unpadded run.  With S sinks, window W and a ring of C slots:

    token t < S                        exact, `sinks[:, :, t]`
    u = t - S, u < P                   packed, tile u // 32,      P = max(0, n - S - W) // 32 * 32
    u = t - S, u >= P                  exact, `recent[:, :, u % C]`,     C >= W + 64

C = 0 means there is no ring: all u are packed (P = n - S, the last tile may be partial).

A packed vector is y = (x - shift) @ map, stored as codes c and one fp16 scale s with y ~ s * level[c].
Codes are the nearest levels of y / (sigma * step) with sigma = |y| / sqrt(D) and the codebook's step (at 8 bits:
sigma = max|y|); then s = <y, level> / <level, level>, the least-squares scale, where the paper stores the norm.
With error feedback F, calibrated maps only, the even dims of y are rounded first; their least-squares scale s1 gives
the error e = s1 * level - y_even, and the odd dims, rounded next to multiples of s1, are y_odd - e @ F; s is fitted to
what was rounded.  (s1 is at least LEAST * sigma * step: even dims may be nearly empty.)
What can be asserted bitwise: pack/unpack; codes and scales given the same float32 y.  Rotations computed
by different kernels differ in the last ulp, so a few codes in 10^4 land on the other side of a threshold.
"""

from collections.abc import Iterator

import torch

from tq_ao.codebook import ROLES, Role, codebook
from tq_ao.packing import TILE, pack, tile_bytes, unpack

LEAST = 0.75  # the scale of even dims, of what the whole vector's length gives; ordinary vectors have 0.8 to 1.3


def bits_of(codes: torch.Tensor, head_dim: int) -> int:
    """Bit width of packed codes uint8 [..., T, bytes]; raises ValueError if no width fits."""
    bits = codes.shape[-1] * 8 // (TILE * head_dim)
    if codes.shape[-1] != tile_bytes(bits, head_dim):
        raise ValueError(f"expected tile bytes of 1, 2, 3, 4 or 8 bits at head_dim {head_dim}, got {codes.shape[-1]}")
    return bits


def _nearest(y: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The levels c [..., D] whose multiples c * scale [..., 1] are nearest to y."""
    if bits == 8:
        return (y * (127 / scale.clamp_min(1e-30))).round().clamp(-127, 127) / 127
    half = 1 << (bits - 1)
    return (y * (1 / scale.clamp_min(1e-30))).floor().clamp(-half, half - 1) + 0.5


def _least_squares(y: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The scale [..., 1] that brings c nearest to y."""
    return (y * c).sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True).clamp_min(1e-30)


def quantize(y: torch.Tensor, bits: int, feedback: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalar-quantise mapped vectors.

    Args:
        y: float32 [..., D]; [..., H, N, D] with feedback.
        bits: code width.
        feedback: float32 [H, D / 2, D / 2], what the odd dims make up for of the even ones' error; None: nothing.

    Returns:
        codes uint8 [..., D] and scales float16 [...].  Zero vectors get scale 0; NaN or inf in, NaN scale out.
    """
    if bits == 8:
        scale = y.abs().amax(-1, keepdim=True)
    else:
        scale = y.square().mean(-1, keepdim=True).sqrt() * codebook(bits).step
    if feedback is None:
        c = _nearest(y, scale, bits)
    else:
        even, odd = y[..., 0::2], y[..., 1::2]
        c_even = _nearest(even, scale, bits)
        scale = torch.maximum(_least_squares(even, c_even), LEAST * scale.clamp_max(1e30))
        error = (c_even * scale - even).bfloat16().float()  # an operand of the kernels' tensor cores
        odd = odd - error @ feedback
        c = torch.stack([c_even, _nearest(odd, scale, bits)], -1).flatten(-2)
        y = torch.stack([even, odd], -1).flatten(-2)
    codes = (c * 127).round().to(torch.int16) & 0xFF if bits == 8 else c + ((1 << (bits - 1)) - 0.5)
    scale = _least_squares(y, c)[..., 0]
    scale = torch.where(torch.isfinite(scale), scale.abs().clamp(max=65504.0), torch.nan)
    return codes.nan_to_num(0.0).to(torch.uint8), scale.half()


def rounded(y: torch.Tensor, bits: int, feedback: torch.Tensor | None = None) -> torch.Tensor:
    """What a reader gets back of mapped vectors y: float32, y's shape."""
    codes, scales = quantize(y, bits, feedback)
    return codebook(bits).tensor(y.device)[codes.long()] * scales.float().unsqueeze(-1)


def encode(
    x: torch.Tensor, map: torch.Tensor, shift: torch.Tensor, bits: int, role: Role,
    feedback: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Map, quantise and pack.

    Args:
        x: [B, H, N, D], any float dtype; N is padded to whole tiles with zero vectors (scale 0).
        map, shift: float32 [H, D, D] and [H, D].
        feedback: float32 [H, D / 2, D / 2] or None.

    Returns:
        codes uint8 [B, H, T, tile_bytes] and scales float16 [B, H, T, 32], T = ceil(N / 32).
    """
    y = (x.float() - shift[:, None]) @ map
    codes, scales = quantize(torch.nn.functional.pad(y, (0, 0, 0, -x.shape[2] % TILE)), bits, feedback)
    return pack(codes, bits, role), scales.unflatten(2, (-1, TILE))


def _padded(dim: int) -> int:
    """The head_dim that tensor cores are given."""
    return max(32, 1 << (dim - 1).bit_length())


def operands_size(dim: int, feedback: bool) -> int:
    """Numbers to a head of what `prepare` returns."""
    padded = _padded(dim)
    return padded * padded + (padded // 2) ** 2 * feedback + 2 * padded + 16


def prepare(map: torch.Tensor, shift: torch.Tensor, role: Role, feedback: torch.Tensor | None = None) -> torch.Tensor:
    """What the kernels multiply by, made ahead of a map; nothing here reads it (`kernels/operands.py` has the layout).

    Args:
        map, shift: float32 [H, D, D] and [H, D].
        feedback: float32 [H, D / 2, D / 2] or None.

    Returns:
        int16 [H, operands_size(D, feedback is not None)].
    """
    heads, dim = shift.shape
    padded = _padded(dim)
    column = torch.arange(padded, device=map.device)
    pair = column[: padded // 2]
    if role == "value":
        pair = pair.view(-1, 2, 4).mT.flatten()
    if feedback is not None:
        column = torch.cat([2 * pair, 2 * pair + 1])
    elif role == "key":
        column = column.view(-1, 4, 2, 2).transpose(1, 2).flatten()
    size, first = map.abs().flatten(1), map[:, 0, 0].abs()
    alike = (size == first[:, None]).all(1) & (first > 0) & (dim == padded)
    unit = torch.where(alike, first, 1.0)
    m = torch.nn.functional.pad(map / unit[:, None, None], (0, padded - dim, 0, padded - dim))[..., column]
    high = (m.view(torch.int32) + 32768 & -65536).view(torch.float32).bfloat16()  # ties away from zero
    minus = torch.nn.functional.pad(-(shift[:, None] @ map)[:, 0] / unit[:, None], (0, padded - dim))[:, column]
    remainder = (map.view(torch.int32) & 0xFFFF).flatten(1).any(1) & ~alike
    parts = [high.flatten(1)]
    if feedback is not None:
        f = torch.nn.functional.pad(feedback.bfloat16(), (0, padded // 2 - dim // 2, 0, padded // 2 - dim // 2))
        parts.append(f[:, pair][..., pair].flatten(1))
    last = torch.zeros(heads, 8, dtype=torch.int32, device=map.device)
    last[:, 0], last[:, 1] = unit.view(torch.int32), remainder
    parts = [part.contiguous().view(torch.int16) for part in (*parts, minus, last)]
    return torch.cat(parts, 1)


def levels_of(codes: torch.Tensor, head_dim: int, role: Role, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unscaled levels of packed tiles: uint8 [..., T, bytes] -> dtype [..., T*32, D]."""
    bits = bits_of(codes, head_dim)
    x = unpack(codes, bits, head_dim, role)
    if bits == 8:
        return x.view(torch.int8).to(dtype).div_(127)
    return x.to(dtype).sub_((2**bits - 1) / 2)


def decode(
    codes: torch.Tensor, scales: torch.Tensor, head_dim: int, role: Role, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Mapped-space vectors of packed tiles: [..., T, bytes], [..., T, 32] -> dtype [..., T*32, D]."""
    return levels_of(codes, head_dim, role, dtype) * scales.to(dtype).flatten(-2).unsqueeze(-1)


def packed_tokens(n: int, sinks: int, window: int, capacity: int) -> int:
    """P of the module docstring: how many tokens of a row with n tokens are packed."""
    return max(0, n - sinks) if capacity == 0 else max(0, n - sinks - window) // TILE * TILE


def in_place(
    x: torch.Tensor, sinks: torch.Tensor, recent: torch.Tensor, new: torch.Tensor | None, length: torch.Tensor,
    start: torch.Tensor, tokens: int, window: int,
) -> torch.Tensor:  # fmt: skip
    """A cache as one dense tensor: row b's token t at position start[b] + t, zeros where no token is.

    Args:
        x: [B, H, T*32, D], the packed tokens, reconstructed; its dtype is the result's.
        sinks, recent, length, start, window: a layer's cache as in `append_`.
        new: exact tokens [B, H, q, D] that follow the cache, or None.
        tokens: positions to give.

    Returns:
        [B, H, tokens, D].
    """
    batch, heads, _, dim = x.shape
    first, capacity = sinks.shape[2], recent.shape[2]
    position = torch.arange(tokens, device=x.device)
    t = position - start[:, None]  # [B, tokens]
    n = (length - start).clamp_min(0)[:, None]
    packed = n - first if capacity == 0 else (n - first - window).clamp_min(0) // TILE * TILE
    u = t - first

    def rows(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        index = index.clamp(0, source.shape[2] - 1)[:, None, :, None].expand(batch, heads, tokens, dim)
        return source.gather(2, index)

    out = torch.zeros(batch, heads, tokens, dim, dtype=x.dtype, device=x.device)
    parts = [(x, u, (u >= 0) & (u < packed)), (sinks, t, (t >= 0) & (t < first) & (t < n))]
    if capacity:
        parts.append((recent, u % capacity, (u >= packed) & (u >= 0) & (t < n)))
    if new is not None:
        i = (position - length).expand_as(t)
        parts.append((new, i, (i >= 0) & (i < new.shape[2]) & (t >= 0)))
    for source, index, where in parts:
        if source.shape[2]:
            out = torch.where(where[:, None, :, None], rows(source.to(x.dtype), index), out)
    return out


def _rows(start: torch.Tensor) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """(start, rows) for each group of rows that begin at the same position."""
    values = start.tolist()
    for value in sorted(set(values)):
        yield value, slice(None) if len(set(values)) == 1 else torch.nonzero(start == value)[:, 0]


def append_(
    k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, length: torch.Tensor, start: torch.Tensor,
    key_map: torch.Tensor, key_shift: torch.Tensor, value_map: torch.Tensor, value_shift: torch.Tensor, window: int,
    key_feedback: torch.Tensor | None = None, value_feedback: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Append q tokens to a layer's cache in place and pack every tile that has left the window.

    Args:
        k_codes, v_codes: uint8 [B, H, T, tile_bytes]; k_scales, v_scales: float16 [B, H, T, 32].
        k_sinks, v_sinks: [B, H, S, D]; k_recent, v_recent: ring [B, H, C, D], C >= window + 64.
        k, v: new tokens [B, H, q, D].
        length: integer 0-d tensor, tokens (padding included) seen before these; not changed here.
        start: integer [B], position of each row's first real token.
        key_map, value_map: float32 [H, D, D]; key_shift, value_shift: float32 [H, D].
        window: tokens kept exact behind the newest.
        key_feedback, value_feedback: float32 [H, D / 2, D / 2] or None.
    """
    q, sinks, capacity, seen = k.shape[2], k_sinks.shape[2], k_recent.shape[2], int(length)
    for first, rows in _rows(start):
        skip = max(0, first - seen)  # padding inside this chunk
        if skip >= q:
            continue
        before, after = max(0, seen - first), seen + q - first
        old, new = (packed_tokens(n, sinks, window, capacity) for n in (before, after))
        sides = (
            (k_codes, k_scales, k_sinks, k_recent, k, key_map, key_shift, key_feedback),
            (v_codes, v_scales, v_sinks, v_recent, v, value_map, value_shift, value_feedback),
        )
        for role, (codes, scales, sink, recent, x, map, shift, feedback) in zip(ROLES, sides, strict=True):
            fresh = x[rows, :, skip:]  # tokens before .. after
            if new > old:
                ring = torch.arange(old, min(new, max(0, before - sinks)), device=x.device) % capacity
                arriving = slice(max(0, old + sinks - before), max(0, new + sinks - before))
                leaving = torch.cat([recent[rows][:, :, ring], fresh[:, :, arriving]], 2)
                bits = bits_of(codes, x.shape[-1])
                tiles = slice(old // TILE, new // TILE)
                codes[rows, :, tiles], scales[rows, :, tiles] = encode(leaving, map, shift, bits, role, feedback)
            if before < sinks:
                sink[rows, :, before : min(sinks, after)] = fresh[:, :, : sinks - before].to(sink.dtype)
            u = torch.arange(max(0, before - sinks, after - sinks - capacity), max(0, after - sinks), device=x.device)
            if len(u):
                ring_rows = recent if isinstance(rows, slice) else recent[rows]
                ring_rows[:, :, u % capacity] = fresh[:, :, u + sinks - before].to(recent.dtype)
                if not isinstance(rows, slice):
                    recent[rows] = ring_rows


def attention(
    q: torch.Tensor, k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    length: torch.Tensor, start: torch.Tensor, query_map: torch.Tensor, key_shift: torch.Tensor,
    output_map: torch.Tensor, value_shift: torch.Tensor, window: int, scale: float, softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None, k_new: torch.Tensor | None = None, v_new: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """Attention of q over a packed cache, and causally over new tokens that are not in it yet.

    Args:
        q: [B, Hq, q_len, D]; Hq is a multiple of H (GQA).
        k_codes ... v_recent, length, start, window: a layer's cache as in `append_`, holding `length` tokens.
        query_map, output_map: float32 [H, D, D]; key_shift, value_shift: float32 [H, D].
        scale: multiplies q.k; softcap: cap * tanh(s / cap) if > 0 (Gemma-2).
        sink_logits: [Hq] logits of a virtual key with value 0 (gpt-oss), or None.
        k_new, v_new: exact [B, H, q_len, D]; query i sees new tokens 0..i.  None: q sees the whole cache.
        dtype: arithmetic; float64 gives the oracle of the kernel tests.

    Returns:
        [B, Hq, q_len, D] in q's dtype.  Queries of padding tokens get zeros.
    """
    batch, q_heads, q_len, dim = q.shape
    heads, sinks, capacity, seen = k_codes.shape[1], k_sinks.shape[2], k_recent.shape[2], int(length)
    out = torch.zeros(batch, q_heads, q_len, dim, dtype=q.dtype, device=q.device)
    for first, rows in _rows(start):
        n = max(0, seen - first)
        packed = packed_tokens(n, sinks, window, capacity)
        tiles = -(-packed // TILE)
        x = q[rows].to(dtype).unflatten(1, (heads, -1)).flatten(2, 3)  # [b, H, G * q_len, D]
        if packed:  # scales multiply scores and weights, one number per token, not the D values of its vector
            k = levels_of(k_codes[rows, :, :tiles], dim, "key", dtype)[:, :, :packed]
            k_scale = k_scales[rows, :, :tiles].flatten(2)[:, :, None, :packed].to(dtype)
            scores = [((x @ query_map.to(dtype)) @ k.mT) * k_scale + x @ key_shift.to(dtype)[:, :, None]]
        else:
            scores = [x.new_zeros(*x.shape[:3], 0)]
        ring = torch.arange(packed, max(packed, n - sinks), device=q.device) % max(1, capacity)
        exact_k = [k_sinks[rows, :, : min(n, sinks)], k_recent[rows][:, :, ring]]
        exact_v = [v_sinks[rows, :, : min(n, sinks)], v_recent[rows][:, :, ring]]
        skip = 0
        if k_new is not None and v_new is not None:
            skip = min(q_len, max(0, first - seen))
            exact_k.append(k_new[rows, :, skip:])
            exact_v.append(v_new[rows, :, skip:])
        scores.append(x @ torch.cat([t.to(dtype) for t in exact_k], 2).mT)
        s = torch.cat(scores, -1) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        s = s.unflatten(2, (-1, q_len))  # [b, H, G, q_len, keys]
        if k_new is not None:
            fresh = torch.arange(q_len, device=q.device)
            hidden = fresh[None, skip:] > fresh[:, None]
            s[..., s.shape[-1] - (q_len - skip) :].masked_fill_(hidden, -torch.inf)
        if sink_logits is not None:
            extra = sink_logits.to(dtype).view(1, heads, -1, 1, 1).expand(s.shape[0], -1, -1, q_len, 1)
            p = torch.softmax(torch.cat([s, extra], -1), -1)[..., :-1]
        else:
            p = torch.softmax(s, -1)
        p = p.flatten(2, 3)  # [b, H, G * q_len, keys]
        o = p[..., packed:] @ torch.cat([t.to(dtype) for t in exact_v], 2)
        if packed:
            v = levels_of(v_codes[rows, :, :tiles], dim, "value", dtype)[:, :, :packed]
            weight = p[..., :packed] * v_scales[rows, :, :tiles].flatten(2)[:, :, None, :packed].to(dtype)
            mass = p[..., :packed].sum(-1, keepdim=True)
            o = o + (weight @ v) @ output_map.to(dtype) + mass * value_shift.to(dtype)[:, None]
        o = o.unflatten(2, (-1, q_len)).flatten(1, 2)
        o[:, :, :skip] = 0  # padding queries saw no key
        out[rows] = o.to(q.dtype)
    return out
