"""Append tokens to a layer's cache: exact to sinks and ring, packed once they leave the window.

Up to STEP_TOKENS tokens are one launch (`step_kernel`); more are `encode` for keys and for values (a launch each, or
two where Gluon encodes whole blocks) and then `write_kernel`.  Where each token goes is decided on the device from
`length` and `start`.
"""

import torch
import triton
import triton.language as tl

from .encode import TILE, as_words, counts, encode_many, operand_type, padded_dim, unit_stride
from .mapped import mapped
from .operands import check, contiguous
from .pack import get_words, load_feedback, put_scales, put_words, quantize, token_order

STEP_TOKENS = 32  # appends up to this long fill at most one tile and cannot overwrite ring slots that are leaving


@triton.jit
def _write_exact(
    x, sink, ring, index, ok, before, skip, x_sn, k_sn, r_sn, sinks, capacity,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Copy tokens `index` of x to their sink or ring slot."""
    dims = tl.arange(0, DP)
    live = (dims < D)[None, :]
    t = before + index - skip
    u = t - sinks
    rows = tl.load(x + index[:, None] * x_sn + dims[None, :], mask=ok[:, None] & live)
    to_ring = ring + (u % capacity)[:, None] * r_sn + dims[None, :]
    tl.store(to_ring, rows.to(ring.dtype.element_ty), mask=(ok & (u >= 0))[:, None] & live)
    to_sink = sink + t[:, None] * k_sn + dims[None, :]
    tl.store(to_sink, rows.to(sink.dtype.element_ty), mask=(ok & (u < 0))[:, None] & live)


@triton.jit(do_not_specialize=["n"])
def write_kernel(
    k, v, k_sinks, v_sinks, k_recent, v_recent, length, start,
    x_sb, x_sh, x_sn, k_sb, k_sh, k_sn, r_sb, r_sh, r_sn,
    heads, n, capacity, sinks, window, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the sinks and the newest tokens of a long append, after `encode_kernel` has read what they replace.

    Grid: (B * H, blocks of ROWS over sinks and ring slots, 2 for keys and values).
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    skip, before, _, _ = counts(length, start, b, n, sinks, window)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # r < sinks is sink r; the others are the last `capacity` tokens, those that are sinks left to the first kind.
    oldest = tl.maximum(n - capacity, tl.maximum(skip, sinks - before + skip))
    index = tl.where(r < sinks, r - before + skip, oldest + r - sinks)
    ok = (index >= skip) & (index < n)
    at_x, at_sink, at_ring = b * x_sb + h * x_sh, b * k_sb + h * k_sh, b * r_sb + h * r_sh
    if tl.program_id(2) == 0:
        _write_exact(
            k + at_x, k_sinks + at_sink, k_recent + at_ring, index, ok, before, skip,
            x_sn, k_sn, r_sn, sinks, capacity, D, DP,
        )  # fmt: skip
    else:
        _write_exact(
            v + at_x, v_sinks + at_sink, v_recent + at_ring, index, ok, before, skip,
            x_sn, k_sn, r_sn, sinks, capacity, D, DP,
        )  # fmt: skip


@triton.jit
def _step_side(
    x, sink, ring, words, scales, map, shift, feedback, h, q, skip, before, old, new, tiles,
    x_sn, k_sn, r_sn, w_st, s_st, sinks, capacity,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, STEP: tl.constexpr, Q: tl.constexpr,
    KC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, Q).to(tl.int64)
    ok = (index >= skip) & (index < q)
    _write_exact(x, sink, ring, index, ok, before, skip, x_sn, k_sn, r_sn, sinks, capacity, D, DP)
    if (new > old) & (old // 32 < tiles):
        # Rows are (half, row of a half).
        row = tl.arange(0, 32)
        token = tl.reshape(tl.broadcast_to(token_order(1, KEY)[None, :], [2, 16]), [32]) + row // 16 * 8
        t = sinks + old + token
        kept = t < before
        rows = tl.where(kept, ring + (old + token) % capacity * r_sn, x + (t - before + skip) * x_sn)
        y = mapped(rows, token < 32, map, shift, D, DP, KEY, feedback is not None, KC, OPERAND)
        operand = None
        if feedback is not None:
            operand = load_feedback(feedback, h, D, DP, KEY, OPERAND)
        codes, scale = quantize(y, operand, D, BITS, STEP, OPERAND)
        codes0, codes1 = tl.split(tl.permute(tl.reshape(codes, [2, 16, DP]), (1, 2, 0)))
        scale0, scale1 = tl.split(tl.permute(tl.reshape(scale, [2, 16]), (1, 0)))
        tile = old // 32
        words0 = get_words(codes0, BITS, KEY)
        words1 = get_words(codes1, BITS, KEY)
        row = tl.arange(0, words0.shape[0])[:, None]
        column = tl.arange(0, words0.shape[1])[None, :]
        put_words(words0, words1, row, column, words + tile * w_st, w_st, 1, D, 1, BITS, KEY)
        order = token_order(1, KEY)
        put_scales(scale0, 1.0, scales + tile * s_st, s_st, order, 1)
        put_scales(scale1, 1.0, scales + tile * s_st, s_st, order + 8, 1)


@triton.jit(do_not_specialize=["k_tiles", "v_tiles"])
def step_kernel(
    k, v, k_sinks, v_sinks, k_recent, v_recent, k_words, k_scales, v_words, v_scales,
    key_map, key_shift, key_feedback, value_map, value_shift, value_feedback, length, start,
    k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, e_sb, e_sh, e_sn, r_sb, r_sh, r_sn,
    kw_sb, kw_sh, kw_st, ks_sb, ks_sh, ks_st, vw_sb, vw_sh, vw_st, vs_sb, vs_sh, vs_st,
    heads, q, k_tiles, v_tiles, capacity, sinks, window,
    D: tl.constexpr, DP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_STEP: tl.constexpr, V_STEP: tl.constexpr, Q: tl.constexpr, KC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Append q <= 32 tokens: write them to sinks and ring, and encode the tile that leaves the window, if one does.

    One launch is enough because C >= window + 64: no slot written here is one that a leaving tile reads.

    Grid: (B * H, 2 for keys and values).
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    skip, before, old, new = counts(length, start, b, q, sinks, window)
    at_sink, at_ring = b * e_sb + h * e_sh, b * r_sb + h * r_sh
    if tl.program_id(1) == 0:
        _step_side(
            k + b * k_sb + h * k_sh, k_sinks + at_sink, k_recent + at_ring, k_words + b * kw_sb + h * kw_sh,
            k_scales + b * ks_sb + h * ks_sh, key_map + h * D * D, key_shift + h * D, key_feedback, h,
            q, skip, before, old, new, k_tiles, k_sn, e_sn, r_sn, kw_st, ks_st, sinks, capacity,
            D, DP, K_BITS, True, K_STEP, Q, KC, OPERAND,
        )  # fmt: skip
    else:
        _step_side(
            v + b * v_sb + h * v_sh, v_sinks + at_sink, v_recent + at_ring, v_words + b * vw_sb + h * vw_sh,
            v_scales + b * vs_sb + h * vs_sh, value_map + h * D * D, value_shift + h * D, value_feedback, h,
            q, skip, before, old, new, v_tiles, v_sn, e_sn, r_sn, vw_st, vs_st, sinks, capacity,
            D, DP, V_BITS, False, V_STEP, Q, KC, OPERAND,
        )  # fmt: skip


def append_(
    k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, length: torch.Tensor, start: torch.Tensor,
    key_map: torch.Tensor, key_shift: torch.Tensor, value_map: torch.Tensor, value_shift: torch.Tensor,
    window: int, key_book, value_book, key_feedback: torch.Tensor | None = None,
    value_feedback: torch.Tensor | None = None, key_operands: torch.Tensor | None = None,
    value_operands: torch.Tensor | None = None, impl: str = "auto",
) -> None:  # fmt: skip
    """Append tokens to a layer's cache in place, as `reference.append_`, without a host synchronisation.

    Tiles beyond the capacity of `k_codes` are dropped.  Operands are read by appends of more than STEP_TOKENS tokens,
    and made by those where they are None.  impl: "triton", or "auto", which leaves what it can to Gluon.

    Raises:
        ValueError: tokens of another dtype, strides that a kernel cannot follow, or operands of other maps, by their
            shape or type.  That shapes agree, and a ring has room for window + 64 tokens, is `tq_ao.ops`' to see to.
    """
    batch, heads, q, dim = k.shape
    capacity, sinks = k_recent.shape[2], k_sinks.shape[2]
    if not k.numel():
        return
    if k_sinks.stride() != v_sinks.stride() or k_recent.stride() != v_recent.stride():
        raise ValueError("expected sinks (and rings) of keys and values to have equal strides; allocate them alike")
    if any(t.stride(-1) != 1 for t in (k_sinks, k_recent)):
        raise ValueError("expected sinks and rings contiguous along their last dimension; allocate them so")
    if k.dtype != k_recent.dtype or v.dtype != v_recent.dtype:
        raise ValueError(
            f"expected new tokens of the ring's dtype {k_recent.dtype}, got {k.dtype} and {v.dtype}; convert them first"
        )
    if key_operands is not None:
        check(key_operands, key_shift, key_feedback, "key")
    if value_operands is not None:
        check(value_operands, value_shift, value_feedback, "value")
    k, v, start = unit_stride(k), unit_stride(v), start.contiguous()
    key = key_map.contiguous(), key_shift.contiguous(), contiguous(key_feedback)
    value = value_map.contiguous(), value_shift.contiguous(), contiguous(value_feedback)
    padded = padded_dim(dim)
    if q <= STEP_TOKENS:
        k_words, v_words = as_words(k_codes, k_scales), as_words(v_codes, v_scales)
        step_kernel[(batch * heads, 2)](
            k, v, k_sinks, v_sinks, k_recent, v_recent, k_words, k_scales, v_words, v_scales, *key, *value,
            length, start, *k.stride()[:3], *v.stride()[:3], *k_sinks.stride()[:3], *k_recent.stride()[:3],
            *k_words.stride()[:3], *k_scales.stride()[:3], *v_words.stride()[:3], *v_scales.stride()[:3],
            heads, q, k_codes.shape[2], v_codes.shape[2], capacity, sinks, window,
            D=dim, DP=padded, K_BITS=key_book.bits, V_BITS=value_book.bits, K_STEP=key_book.step,
            V_STEP=value_book.step, Q=triton.next_power_of_2(q), KC=32, OPERAND=operand_type(),
            num_warps=4, num_stages=1,
        )  # fmt: skip
        return
    tiles = triton.cdiv(q, TILE)
    place = length, start, tiles, sinks, window
    gluon = impl != "triton"
    encode_many(k, k_recent, k_codes, k_scales, *key, key_operands, *place, "key", key_book, gluon)
    encode_many(v, v_recent, v_codes, v_scales, *value, value_operands, *place, "value", value_book, gluon)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    rows = 32
    write_kernel[(batch * heads, triton.cdiv(sinks + min(q, capacity), rows), 2)](
        k, v, k_sinks, v_sinks, k_recent, v_recent, length, start,
        *k.stride()[:3], *k_sinks.stride()[:3], *k_recent.stride()[:3], heads, q, capacity, sinks, window,
        D=dim, DP=padded, ROWS=rows, num_warps=4,
    )  # fmt: skip
