"""Map, quantise and pack in registers: whole prefills, and the tile that has just left the window.

    y = (x - shift) @ map      c = clamp(floor(y / (sigma * step))) + 1/2      scale = <y, c> / <c, c>

With error feedback the even dims of y are quantised first and the odd ones make up for their error (`pack.quantize`).
What is written where is decided on the device from `length` and `start`, so a captured CUDA graph replays correctly.
"""

import torch
import triton
import triton.language as tl

from .mapped import (
    arranged,
    largest,
    load_map,
    load_rows,
    map_operands,
    map_parts,
    mapped,
    minus_shift,
    shift_operand,
    times_map,
)
from .pack import arrange, get_words, load_feedback, put_scales, put_words, quantize, token_order

TILE = 32
WIDE = 200  # KiB of shared memory: a chip with wgmma or tcgen05
STEP_TOKENS = 32  # appends up to this long fill at most one tile and cannot overwrite ring slots that are leaving


@triton.jit
def _prefetch(rows, ok, D: tl.constexpr):
    """Start the vectors at pointers rows [N] on their way to L2."""
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.cdiv(D, LINE)
    for i in tl.static_range(LINES):
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
            [(rows + i * LINE).to(tl.int64), ok.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _counts(length, start, b, q, sinks, window):
    """Of row b: padding tokens among the q new ones, real tokens before, packed tokens before and after."""
    seen = tl.load(length).to(tl.int64)
    first = tl.load(start + b).to(tl.int64)
    skip = tl.minimum(tl.maximum(first - seen, 0), q)
    before = tl.maximum(seen - first, 0)
    old = tl.maximum(before - sinks - window, 0) // 32 * 32
    new = tl.maximum(before + q - skip - sinks - window, 0) // 32 * 32
    return skip, before, old, new


@triton.jit
def _put_half(
    y, operand, words0, scale0, half, unit, words, scales, w_st, s_st, order, tile, left,
    D: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Quantise half a block; the second half is stored with the first, words0 and scale0.  Returns its own."""
    codes, scale1 = quantize(y, operand, D, BITS, STEP, OPERAND)
    words1 = get_words(codes, BITS, KEY)
    if half % 2 == 1:
        at = tile.to(tl.int64)
        put_words(words0, words1, words + at * w_st, w_st, left, D, TILES, BITS, KEY)
        put_scales(scale0, scale1, unit, scales + at * s_st, s_st, order, left)
    return words1, scale1


@triton.jit(do_not_specialize=["n", "tiles"])
def encode_kernel(
    x, ring, words, scales, map, shift, feedback, length, start,
    x_sb, x_sh, x_sn, r_sb, r_sh, r_sn, w_sb, w_sh, w_st, s_sb, s_sh, s_st,
    heads, n, tiles, capacity, sinks, window, blocks,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, STEP: tl.constexpr,
    TILES: tl.constexpr, KC: tl.constexpr, HALVES: tl.constexpr, RING: tl.constexpr, AHEAD: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Encode many tiles of one side (keys or values).

    RING False: tile i is tokens 32 i .. 32 i + 31 of x, of which n exist.  RING True: x holds the n tokens of an
    append, and the tiles are those that leave the window with it; tokens older than x are in the ring.

    Grid: (B * H, chunks); a program encodes up to `blocks` blocks of TILES tiles, half a block (16 tokens of each tile)
    at a time.  Up to D = 128 its map stays in shared memory (WHOLE); at D = 256 the high part does where it fits
    (HALVES: two of 128 rows, for a bf16 x); others are streamed.  AHEAD: tokens that are on their way to L2 while the
    map is prepared.  feedback: of all heads, or None.
    """
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    x += b * x_sb + h * x_sh
    words += b * w_sb + h * w_sh
    scales += b * s_sb + h * s_sh
    map += h * D * D
    shift += h * D
    if RING:
        ring += b * r_sb + h * r_sh
        skip, before, old, new = _counts(length, start, b, n, sinks, window)
        tile0 = old // 32
        count = (tl.minimum(new // 32, tiles) - tile0).to(tl.int32)
        # Rows at `old` + i of the packed sequence are in x from i = fresh on, and in the ring before that.
        fresh = (before - sinks - old).to(tl.int32)
        x -= (fresh - skip) * x_sn
        slot0 = (old % capacity).to(tl.int32)
        words += tile0 * w_st
        scales += tile0 * s_st
    else:
        count = (n + 31) // 32
    WHOLE: tl.constexpr = DP <= 128
    SPLIT: tl.constexpr = HALVES and x.dtype.element_ty == tl.bfloat16
    FEEDBACK: tl.constexpr = feedback is not None
    first = tl.program_id(1) * blocks
    last = tl.minimum(first + blocks, (count + TILES - 1) // TILES)
    if first < last:
        order = token_order(TILES, KEY)
        if AHEAD:  # while the map is prepared
            early = first * (TILES * 32) + tl.arange(0, AHEAD)
            if RING:
                wanted = (early >= fresh) & (early < count * 32)
            else:
                wanted = early < n
            _prefetch(x + early.to(tl.int64) * x_sn, wanted, D)
        operand = None
        if FEEDBACK:
            operand = load_feedback(feedback, h, D, DP, KEY, OPERAND)
        unit = 1.0
        if WHOLE or SPLIT:
            dims = tl.arange(0, DP)
            # (x - shift) @ map = x @ map - shift @ map; with the same two parts of the map in both, what they
            # leave out multiplies x - shift only.
            top = tl.max(tl.abs(tl.load(map + dims, mask=dims < D, other=0.0)), axis=0)
            least = tl.min(tl.abs(tl.load(map + dims, mask=dims < D, other=float("inf"))), axis=0)
            unit = tl.where((top > 0) & (least == top), top, 1.0)
            inverse = 1.0 / unit
            if WHOLE:
                high, low = map_parts(arranged(map, 0, D, DP, DP, KEY, FEEDBACK), unit, inverse)
                map_has_low = largest(low) > 0
                m_high, m_low = high.to(tl.bfloat16).to(OPERAND), low.to(tl.bfloat16).to(OPERAND)
                has_shift = tl.max(tl.abs(tl.load(shift + dims, mask=dims < D, other=0.0)), axis=0) > 0
                shifted = tl.zeros([DP], tl.float32)
                if has_shift:
                    for k in range(0, DP, KC):
                        k_high, k_low = map_operands(arranged(map, k, D, DP, KC, KEY, FEEDBACK), unit, inverse, OPERAND)
                        part = tl.load(shift + k + tl.arange(0, KC), mask=k + tl.arange(0, KC) < D, other=0.0)
                        shifted += tl.sum(part[:, None] * (k_high.to(tl.float32) + k_low.to(tl.float32)), axis=0)
            else:
                remainder = 0.0
                products = tl.zeros([KC, DP], tl.float32)
                for k in range(0, DP, KC):  # one pass over the map for both, in its own order of columns
                    high, low = map_parts(load_map(map, k, D, DP, KC), unit, inverse)
                    remainder = tl.maximum(remainder, largest(low))
                    part = tl.load(shift + k + tl.arange(0, KC), mask=k + tl.arange(0, KC) < D, other=0.0)
                    products += part[:, None] * (high + low.to(tl.bfloat16).to(tl.float32))
                shifted = tl.reshape(arrange(tl.sum(products, axis=0)[None, :], KEY, FEEDBACK), [DP])
                minus = shift_operand(shifted, OPERAND)
                map_has_low = remainder > 0
                m_high, _low = map_operands(arranged(map, 0, D, DP, 128, KEY, FEEDBACK), unit, inverse, OPERAND)
                m2_high, _low2 = map_operands(arranged(map, 128, D, DP, 128, KEY, FEEDBACK), unit, inverse, OPERAND)
        # Blocks begin .. end - 1 are whole and all in x; those before and after them need masks or the ring.
        begin = last
        end = last
        if WHOLE or SPLIT:
            if RING:
                begin = tl.minimum(tl.maximum((fresh + TILES * 32 - 1) // (TILES * 32), first), last)
                end = tl.minimum(tl.maximum(count // TILES, begin), last)
            else:
                begin = first
                end = tl.minimum(tl.maximum(n // (TILES * 32), begin), last)
        if SPLIT:
            if map_has_low:
                begin = last
                end = last
        words0 = get_words(tl.zeros([TILES * 16, DP], tl.int32), BITS, KEY)
        scale0 = tl.zeros([TILES * 16], tl.float32)
        for i in tl.range(2 * first, 2 * (last - end + begin), num_stages=1):
            half = tl.where(i < 2 * begin, i, i + 2 * (end - begin))
            tile = half // 2 * TILES
            token = order + half % 2 * 8
            left = count - tile
            rows = x + (tile * 32).to(tl.int64) * x_sn + token * x_sn
            if RING:
                ok = token < left * 32
                slot = (slot0 + tile * 32) % capacity + token
                slot = tl.where(slot >= capacity, slot - capacity, slot)
                slot = tl.where(slot >= capacity, slot - capacity, slot)
                rows = tl.where(tile * 32 + token < fresh, ring + slot * r_sn, rows)
            else:
                ok = token < n - tile * 32
            if WHOLE:
                y = times_map(load_rows(rows, ok, 0, D, DP), m_high, m_low, map_has_low, OPERAND)
                if has_shift:
                    y -= tl.where(ok, 1.0, 0.0)[:, None] * shifted[None, :]
            elif SPLIT:
                y = minus_shift(ok, minus, OPERAND)
                y = tl.dot(load_rows(rows, ok, 0, D, 128).to(OPERAND), m_high, y, input_precision="ieee")
                y = tl.dot(load_rows(rows, ok, 128, D, 128).to(OPERAND), m2_high, y, input_precision="ieee")
                if map_has_low:
                    for k in range(0, DP, KC):
                        chunk = load_rows(rows, ok, k, D, KC)
                        _high, rest = map_operands(arranged(map, k, D, DP, KC, KEY, FEEDBACK), unit, inverse, OPERAND)
                        y = tl.dot(chunk.to(OPERAND), rest, y, input_precision="ieee")
            else:
                y = mapped(rows, ok, map, shift, D, DP, KEY, FEEDBACK, KC, OPERAND)
            words0, scale0 = _put_half(
                y, operand, words0, scale0, half, unit, words, scales, w_st, s_st, order, tile, left,
                D, BITS, KEY, STEP, TILES, OPERAND,
            )  # fmt: skip
        if WHOLE or SPLIT:
            rows = x + order * x_sn
            always = order >= 0
            for half in range(2 * begin, 2 * end):
                tile = half // 2 * TILES
                here = rows + (tile * 32 + half % 2 * 8).to(tl.int64) * x_sn
                if WHOLE:
                    y = times_map(load_rows(here, always, 0, D, DP), m_high, m_low, map_has_low, OPERAND)
                    if has_shift:
                        y -= shifted[None, :]
                else:
                    y = minus_shift(always, minus, OPERAND)
                    y = tl.dot(load_rows(here, always, 0, D, 128).to(OPERAND), m_high, y, input_precision="ieee")
                    y = tl.dot(load_rows(here, always, 128, D, 128).to(OPERAND), m2_high, y, input_precision="ieee")
                words0, scale0 = _put_half(
                    y, operand, words0, scale0, half, unit, words, scales, w_st, s_st, order, tile, TILES,
                    D, BITS, KEY, STEP, TILES, OPERAND,
                )  # fmt: skip


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
    skip, before, _, _ = _counts(length, start, b, n, sinks, window)
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
        put_words(
            get_words(codes0, BITS, KEY), get_words(codes1, BITS, KEY), words + tile * w_st, w_st, 1,
            D, 1, BITS, KEY,
        )  # fmt: skip
        put_scales(scale0, scale1, 1.0, scales + tile * s_st, s_st, token_order(1, KEY), 1)


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
    skip, before, old, new = _counts(length, start, b, q, sinks, window)
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


def _operand() -> tl.dtype:
    return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def _words(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if codes.stride(-1) != 1 or scales.stride(-1) != 1:
        raise ValueError(
            f"expected codes and scales contiguous along their last dimension, got strides {codes.stride()} and "
            f"{scales.stride()}; call .contiguous() on them"
        )
    return codes.view(torch.int32)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(feedback: torch.Tensor | None) -> torch.Tensor | None:
    return None if feedback is None else feedback.contiguous()


def padded_dim(dim: int) -> int:
    return max(32, triton.next_power_of_2(dim))


def launch_options(dim: int, shared: int, feedback: bool) -> dict[str, int]:
    """Block sizes of `encode_kernel` on a chip with `shared` KiB of shared memory in a multiprocessor."""
    wide = shared >= WIDE
    options = {"TILES": 4, "KC": 32, "num_warps": 4 if wide else 8, "HALVES": False}
    if dim > 128:
        halves = dim == 256 and shared >= (WIDE if feedback else 160)
        if halves and feedback:  # no room for two stages of rows: twice the rows and warps instead
            return {**options, "HALVES": True, "TILES": 8, "num_warps": 8, "num_stages": 1}
        return {**options, "HALVES": halves, "num_stages": 2 if wide else 1}
    stages = 3 if dim == padded_dim(dim) else 2
    if feedback and dim > 64:  # the feedback has the room of a stage of rows
        stages = 2 if shared >= 160 else 1
    return {**options, "num_stages": stages}


def shared_kib(device: torch.device) -> int:
    """Shared memory of a multiprocessor in KiB; what an sm_80 has for the interpreter."""
    if device.type != "cuda":
        return 164
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor // 1024


def _encode_many(x, ring, codes, scales, map, shift, feedback, length, start, tiles, sinks, window, key, book):
    """Launch `encode_kernel` over at most `tiles` tiles per row and head."""
    batch, heads, n, dim = x.shape
    words = _words(codes, scales)
    options = launch_options(dim, shared_kib(x.device), feedback is not None)
    blocks = triton.cdiv(tiles, options["TILES"])
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    resident = 4 if dim <= 64 else 2 if dim <= 128 else 1  # programs to a multiprocessor
    per_program = max(1, triton.cdiv(blocks * batch * heads, resident * cores))
    encode_kernel[(batch * heads, triton.cdiv(blocks, per_program))](
        x, ring, words, scales, map, shift, feedback, length, start,
        *x.stride()[:3], *(ring.stride()[:3] if ring is not None else (0, 0, 0)), *words.stride()[:3],
        *scales.stride()[:3],
        heads, n, codes.shape[2], ring.shape[2] if ring is not None else 1, sinks, window, per_program,
        D=dim, DP=padded_dim(dim), BITS=book.bits, KEY=key, STEP=book.step, RING=ring is not None,
        AHEAD=256 if x.is_cuda and torch.version.hip is None else 0, OPERAND=_operand(), **options,
    )  # fmt: skip


def encode(
    x: torch.Tensor, map: torch.Tensor, shift: torch.Tensor, book, role: str, feedback: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map, quantise and pack x, as `reference.encode`.

    Args:
        x: [B, H, N, D], bf16, fp16 or float32, any strides; the last tile is filled up with zero vectors.
        map, shift: float32 [H, D, D] and [H, D].
        book: codebook with fields bits and step.
        role: "key" or "value".
        feedback: float32 [H, D / 2, D / 2], multiplied as bf16, or None.

    Returns:
        codes uint8 [B, H, T, 32 * D * bits / 8] and scales float16 [B, H, T, 32], T = ceil(N / 32).
    """
    batch, heads, n, dim = x.shape
    tiles = triton.cdiv(n, TILE)
    codes = torch.empty(batch, heads, tiles, TILE * dim * book.bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, heads, tiles, TILE, dtype=torch.float16, device=x.device)
    if codes.numel():
        x = _unit_stride(x)
        map, shift, feedback = map.contiguous(), shift.contiguous(), _contiguous(feedback)
        _encode_many(x, None, codes, scales, map, shift, feedback, None, None, tiles, 0, 0, role == "key", book)
    return codes, scales


def append_(
    k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, length: torch.Tensor, start: torch.Tensor,
    key_map: torch.Tensor, key_shift: torch.Tensor, value_map: torch.Tensor, value_shift: torch.Tensor,
    window: int, key_book, value_book, key_feedback: torch.Tensor | None = None,
    value_feedback: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Append tokens to a layer's cache in place, as `reference.append_`, without a host synchronisation.

    Tiles beyond the capacity of `k_codes` are dropped.

    Raises:
        ValueError: a ring shorter than window + 64, tokens of another dtype, or strides that a kernel cannot follow.
    """
    batch, heads, q, dim = k.shape
    capacity, sinks = k_recent.shape[2], k_sinks.shape[2]
    if capacity < window + 2 * TILE:
        raise ValueError(f"expected a ring of at least window + 64 = {window + 64} slots, got {capacity}; enlarge it")
    if k_sinks.stride() != v_sinks.stride() or k_recent.stride() != v_recent.stride():
        raise ValueError("expected sinks (and rings) of keys and values to have equal strides; allocate them alike")
    if any(t.stride(-1) != 1 for t in (k_sinks, k_recent)):
        raise ValueError("expected sinks and rings contiguous along their last dimension; allocate them so")
    if k.dtype != k_recent.dtype or v.dtype != v_recent.dtype:
        raise ValueError(
            f"expected new tokens of the ring's dtype {k_recent.dtype}, got {k.dtype} and {v.dtype}; convert them first"
        )
    k, v = _unit_stride(k), _unit_stride(v)
    key = key_map.contiguous(), key_shift.contiguous(), _contiguous(key_feedback)
    value = value_map.contiguous(), value_shift.contiguous(), _contiguous(value_feedback)
    padded = padded_dim(dim)
    if q <= STEP_TOKENS:
        k_words, v_words = _words(k_codes, k_scales), _words(v_codes, v_scales)
        step_kernel[(batch * heads, 2)](
            k, v, k_sinks, v_sinks, k_recent, v_recent, k_words, k_scales, v_words, v_scales, *key, *value,
            length, start, *k.stride()[:3], *v.stride()[:3], *k_sinks.stride()[:3], *k_recent.stride()[:3],
            *k_words.stride()[:3], *k_scales.stride()[:3], *v_words.stride()[:3], *v_scales.stride()[:3],
            heads, q, k_codes.shape[2], v_codes.shape[2], capacity, sinks, window,
            D=dim, DP=padded, K_BITS=key_book.bits, V_BITS=value_book.bits, K_STEP=key_book.step,
            V_STEP=value_book.step, Q=triton.next_power_of_2(q), KC=32, OPERAND=_operand(),
            num_warps=4, num_stages=1,
        )  # fmt: skip
        return
    tiles = triton.cdiv(q, TILE)
    _encode_many(k, k_recent, k_codes, k_scales, *key, length, start, tiles, sinks, window, True, key_book)
    _encode_many(v, v_recent, v_codes, v_scales, *value, length, start, tiles, sinks, window, False, value_book)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    rows = 32
    write_kernel[(batch * heads, triton.cdiv(sinks + min(q, capacity), rows), 2)](
        k, v, k_sinks, v_sinks, k_recent, v_recent, length, start,
        *k.stride()[:3], *k_sinks.stride()[:3], *k_recent.stride()[:3], heads, q, capacity, sinks, window,
        D=dim, DP=padded, ROWS=rows, num_warps=4,
    )  # fmt: skip
