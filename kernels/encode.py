"""Map, quantise and pack in registers: whole prefills, and the tile that has just left the window.

    y = (x - shift) @ map        codes = nearest levels of y / sigma        scale = <y, c> / <c, c>

The product runs on tensor cores in two bf16 parts (high + remainder, 17 bits): map = m_hi + m_lo, and x = x_hi + x_lo
unless x is bf16 already; x_lo m_lo is left out.  Maps are divided by their largest entry first, which makes a
randomised Hadamard matrix +-1, and a remainder that is all zero is skipped at run time.  Under the Triton
interpreter, whose bf16 product is wrong, the same parts are multiplied as float32.

What is written where is decided on the device from `length` and `start`, so a captured CUDA graph replays correctly.
"""

import itertools
import struct

import torch
import triton
import triton.language as tl

TILE = 32
STEP_TOKENS = 32  # appends up to this long fill at most one tile and cannot overwrite ring slots that are leaving


@triton.jit
def _quantize(y, live, D: tl.constexpr, BITS: tl.constexpr, EDGES: tl.constexpr, LEVELS: tl.constexpr):
    """y [N, DP] float32, zero where not live -> codes int32 [N, DP], least-squares scales float32 [N]."""
    a = tl.abs(y)
    if BITS == 8:
        inverse = 127.0 / tl.maximum(tl.max(a, axis=1), 1e-30)
        # Adding 1.5 * 2**23 rounds to nearest even and leaves the two's complement code in the low bits.
        rounded = y * inverse[:, None] + 12582912.0
        codes = rounded.to(tl.int32, bitcast=True) & 255
        c = rounded - 12582912.0
        top = 127.0
        product = tl.sum(y * c, axis=1)
    else:
        sigma = tl.sqrt(tl.sum(y * y, axis=1) / D)
        # The low mantissa bits of a level hold its index: one select per threshold picks both.
        c = tl.full(y.shape, LEVELS[0], tl.float32)
        for i in tl.static_range(len(EDGES)):
            c = tl.where(a > (EDGES[i] * sigma)[:, None], LEVELS[i + 1], c)
        HALF: tl.constexpr = 1 << (BITS - 1)
        index = c.to(tl.int32, bitcast=True) & (HALF - 1)
        if BITS == 4:  # sign-magnitude
            codes = index ^ tl.where(y > 0, 0, 8)
        else:  # ascending
            codes = index ^ tl.where(y > 0, HALF, HALF - 1)
        top = 1.0
        product = tl.sum(a * c, axis=1)
        if y.shape[1] != D:
            c = tl.where(live, c, 0.0)
    scale = top * product / tl.maximum(tl.sum(c * c, axis=1), 1e-30)
    return codes, scale


@triton.jit
def _store_codes(codes, words, tile_stride, tile_ok, D: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr):
    """Pack codes int32 [TILES * 32 tokens, DP] into layout v1 (packing.py) at words + tile * tile_stride."""
    TILES: tl.constexpr = codes.shape[0] // 32
    R: tl.constexpr = codes.shape[1] // 32
    G: tl.constexpr = D // 32
    PER: tl.constexpr = 8 if KEY and BITS < 8 else 4  # consecutive codes first summed into one word
    PARTS: tl.constexpr = 4 if BITS < 8 else 8  # words of up to eight codes in a group of 32
    if KEY:  # tile i g j t byte -> tile g t (i j) byte, two j to a word below 8 bits
        if BITS == 8:
            c = tl.permute(tl.reshape(codes, [TILES, 4, 8, 2 * R, 4, 4]), (0, 2, 4, 1, 3, 5))
        else:
            c = tl.reshape(codes, [TILES, 4, 8, R, 2, 4, 4])
            c = tl.permute(c, (0, 2, 5, 1, 3, 4, 6))
    else:  # tile j0 b1 t b0 group s g -> tile g t group s j0 b1 b0
        c = tl.permute(tl.reshape(codes, [TILES, 2, 2, 4, 2, R, 4, 8]), (0, 7, 3, 5, 6, 1, 2, 4))
    # Shifts written as products with exact powers of two, so that shift and sum become one multiply-add.
    WIDTH: tl.constexpr = 8 if BITS == 8 else 4
    factor = ((127 + WIDTH * tl.arange(0, PER)) << 23).to(tl.float32, bitcast=True).to(tl.int32)
    part = tl.sum(tl.reshape(c, [TILES, 32, R * 32 // PER, PER]) * factor[None, None, None, :], axis=3)
    if not KEY and BITS < 8:
        low, high = tl.split(tl.reshape(part, [TILES, 32, R * PARTS, 2]))  # j0
        part = low | (high << 16)
    if KEY and R != G:  # close the gaps that padding left behind each i
        p = tl.arange(0, R * PARTS)
        source = tl.minimum(p // (G * PARTS // 4) * (R * PARTS // 4) + p % (G * PARTS // 4), R * PARTS - 1)
        part = tl.gather(part, tl.broadcast_to(source[None, None, :], part.shape), axis=2)

    tile = tl.arange(0, TILES).to(tl.int64)[:, None, None]
    lane = tl.arange(0, 32)[None, :, None]
    if BITS == 4 or BITS == 8:
        p = tl.arange(0, R * PARTS)[None, None, :]
        at = words + tile * tile_stride + ((p % PARTS) * 32 + lane) * G + p // PARTS
        tl.store(at, part, mask=tile_ok[:, None, None] & (p // PARTS < G))
    else:
        even, odd = tl.split(tl.reshape(part, [TILES, 32, R, 2, 2]))
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        # One store of all planes: each store costs a trip through shared memory.
        group = tl.arange(0, R)[None, None, :]
        at = words + tile * tile_stride + lane * G + group
        ok = tl.broadcast_to(tile_ok[:, None, None] & (group < G), s0.shape)
        if BITS == 3:
            w0 = s0 | ((s3 & 0x11111111) << 3)
            w1 = s1 | (((s3 >> 1) & 0x11111111) << 3)
            w2 = s2 | (((s3 >> 2) & 0x11111111) << 3)
            w = tl.join(tl.join(w0, w2), tl.join(w1, w2))
            half = tl.arange(0, 2)
            plane = (2 * half[:, None] + half[None, :])[None, None, None, :, :]
            at = at[:, :, :, None, None] + plane * (32 * G)
            tl.store(at, w, mask=ok[:, :, :, None, None] & (plane < 3))
        elif BITS == 2:
            plane = tl.arange(0, 2)[None, None, None, :]
            w = tl.join(s0 | (s1 << 2), s2 | (s3 << 2))
            tl.store(at[:, :, :, None] + plane * (32 * G), w, mask=ok[:, :, :, None])
        else:
            tl.store(at, s0 | (s1 << 1) | (s2 << 2) | (s3 << 3), mask=ok)


@triton.jit
def _store_tiles(
    y, unit, words, tile_stride, scales, scale_stride, tile_ok,
    D: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, EDGES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Quantise and store y [TILES * 32, DP]; `unit` is the factor y still lacks."""
    live = (tl.arange(0, y.shape[1]) < D)[None, :]
    codes, scale = _quantize(y, live, D, BITS, EDGES, LEVELS)
    _store_codes(codes, words, tile_stride, tile_ok, D, BITS, KEY)
    scale = scale * unit
    scale = tl.where(tl.abs(scale) < float("inf"), tl.minimum(scale, 65504.0), float("nan"))
    TILES: tl.constexpr = y.shape[0] // 32
    tile = tl.arange(0, TILES).to(tl.int64)[:, None]
    at = scales + tile * scale_stride + tl.arange(0, 32)[None, :]
    tl.store(at, tl.reshape(scale, [TILES, 32]).to(tl.float16), mask=tile_ok[:, None])


@triton.jit
def _split(x, OPERAND: tl.constexpr):
    """float32 x as high part (truncated, so a bf16 x has no remainder) and remainder, both dot operands."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16).to(OPERAND), (x - high).to(tl.bfloat16).to(OPERAND)


@triton.jit
def _split_map(m, unit, inverse, OPERAND: tl.constexpr):
    """m / unit as high part (rounded, so +-unit has no remainder) and remainder, both dot operands."""
    high = ((m * inverse).to(tl.int32, bitcast=True) + 32768 & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16).to(OPERAND), ((m - high * unit) * inverse).to(tl.bfloat16).to(OPERAND)


@triton.jit
def _load_map(map, first, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Rows first .. first + ROWS - 1 of a map, float32 [ROWS, DP], zero beyond D."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    inside = (rows < D)[:, None] & (columns < D)[None, :]
    return tl.load(map + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _largest(x):
    return tl.max(tl.reshape(tl.abs(x.to(tl.float32)), [x.shape[0] * x.shape[1]]), axis=0)


@triton.jit
def _load_rows(
    x, ring, token, fresh, slot, kept, first, x_sn, x_sd, r_sn, r_sd,
    D: tl.constexpr, K: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Dims first .. first + K - 1 of rows [N, K]: token[i] of x where fresh, ring slot slot[i] where kept, else 0."""
    dims = first + tl.arange(0, K)
    inside = (dims < D)[None, :]
    rows = tl.load(x + token[:, None] * x_sn + dims[None, :] * x_sd, mask=fresh[:, None] & inside, other=0.0)
    if RING:
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            old = ring + slot[:, None] * r_sn + dims[None, :] * r_sd
            rows += tl.load(old, mask=kept[:, None] & inside, other=0.0)
    return rows


@triton.jit
def _mapped(
    x, ring, token, fresh, slot, kept, x_sn, x_sd, r_sn, r_sd, map, shift,
    D: tl.constexpr, DP: tl.constexpr, KC: tl.constexpr, RING: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y [N, DP] = (rows - shift) @ map, the map streamed KC rows at a time."""
    y = tl.zeros([token.shape[0], DP], tl.float32)
    for first in range(0, DP, KC):
        rows = _load_rows(x, ring, token, fresh, slot, kept, first, x_sn, x_sd, r_sn, r_sd, D, KC, RING)
        offset = tl.load(shift + first + tl.arange(0, KC), mask=first + tl.arange(0, KC) < D, other=0.0)
        delta = tl.where((fresh | kept)[:, None], rows.to(tl.float32) - offset[None, :], 0.0)
        x_high, x_low = _split(delta, OPERAND)
        m_high, m_low = _split_map(_load_map(map, first, D, DP, KC), 1.0, 1.0, OPERAND)
        y = tl.dot(x_low, m_high, y, input_precision="ieee")
        y = tl.dot(x_high, m_low, y, input_precision="ieee")
        y = tl.dot(x_high, m_high, y, input_precision="ieee")
    return y


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


@triton.jit(do_not_specialize=["n", "tiles"])
def encode_kernel(
    x, ring, words, scales, map, shift, length, start,
    x_sb, x_sh, x_sn, x_sd, r_sb, r_sh, r_sn, r_sd, w_sb, w_sh, w_st, s_sb, s_sh, s_st,
    heads, n, tiles, capacity, sinks, window, blocks,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr,
    EDGES: tl.constexpr, LEVELS: tl.constexpr, TILES: tl.constexpr, KC: tl.constexpr,
    RING: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Encode many tiles of one side (keys or values).

    RING False: tile i is tokens 32 i .. 32 i + 31 of x, of which n exist.  RING True: x holds the n tokens of an
    append, and the tiles are those that leave the window with it; tokens older than x are in the ring.

    Grid: (B * H, chunks); a program encodes up to `blocks` blocks of TILES tiles.  Up to D = 128 its map
    stays in shared memory (WHOLE); at D = 256 the high part does (HALVES: two of 128 rows); others are streamed.
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
    else:
        tile0 = 0
        count = (n + 31) // 32
    WHOLE: tl.constexpr = DP <= 128
    HALVES: tl.constexpr = DP == 256 and x.dtype.element_ty == tl.bfloat16
    first = tl.program_id(1) * blocks
    last = tl.minimum(first + blocks, (count + TILES - 1) // TILES)
    if first < last:
        row = tl.arange(0, TILES * 32)
        unit = 0.0 if HALVES else 1.0
        if WHOLE or HALVES:
            dims = tl.arange(0, DP)
            # (x - shift) @ map = x @ map - shift @ map; with the same two parts of the map in both, what they
            # leave out multiplies x - shift only.
            has_shift = tl.max(tl.abs(tl.load(shift + dims, mask=dims < D, other=0.0)), axis=0) > 0
            if WHOLE:
                m = _load_map(map, 0, D, DP, DP)
                unit = _largest(m)
                inverse = tl.where(unit > 0, 1.0 / unit, 0.0)
                m_high, m_low = _split_map(m, unit, inverse, OPERAND)
                map_has_low = _largest(m_low) > 0
            else:
                for k in range(0, DP, KC):
                    unit = tl.maximum(unit, _largest(_load_map(map, k, D, DP, KC)))
                inverse = tl.where(unit > 0, 1.0 / unit, 0.0)
                remainder = 0.0
                for k in range(0, DP, KC):
                    _chunk, chunk_low = _split_map(_load_map(map, k, D, DP, KC), unit, inverse, OPERAND)
                    remainder = tl.maximum(remainder, _largest(chunk_low))
                map_has_low = remainder > 0
                m_high, _low = _split_map(_load_map(map, 0, D, DP, 128), unit, inverse, OPERAND)
                m2_high, _low2 = _split_map(_load_map(map, 128, D, DP, 128), unit, inverse, OPERAND)
            shifted = tl.zeros([DP], tl.float32)
            if has_shift:
                for k in range(0, DP, KC):
                    high, low = _split_map(_load_map(map, k, D, DP, KC), unit, inverse, OPERAND)
                    part = tl.load(shift + k + tl.arange(0, KC), mask=k + tl.arange(0, KC) < D, other=0.0)
                    shifted += tl.sum(part[:, None] * (high.to(tl.float32) + low.to(tl.float32)), axis=0)
        for block in range(first, last):
            tile = block * TILES
            row_ok = tile + row // 32 < count
            if RING:
                t = sinks + (tile0 + tile) * 32 + row
                fresh = row_ok & (t >= before)
                kept = row_ok & (t < before)
                token = t - before + skip
                slot = (t - sinks) % capacity
            else:
                token = tile.to(tl.int64) * 32 + row
                fresh = row_ok & (token < n)
                kept = fresh
                slot = token
            if WHOLE:
                rows = _load_rows(x, ring, token, fresh, slot, kept, 0, x_sn, x_sd, r_sn, r_sd, D, DP, RING)
                if x.dtype.element_ty == tl.bfloat16:
                    x_high = rows.to(OPERAND)
                else:
                    x_high, x_low = _split(rows.to(tl.float32), OPERAND)
                y = tl.dot(x_high, m_high, input_precision="ieee")
                if x.dtype.element_ty != tl.bfloat16:
                    y = tl.dot(x_low, m_high, y, input_precision="ieee")
                if map_has_low:
                    y = tl.dot(x_high, m_low, y, input_precision="ieee")
            elif HALVES:
                rows = _load_rows(x, ring, token, fresh, slot, kept, 0, x_sn, x_sd, r_sn, r_sd, D, 128, RING)
                y = tl.dot(rows.to(OPERAND), m_high, input_precision="ieee")
                rows = _load_rows(x, ring, token, fresh, slot, kept, 128, x_sn, x_sd, r_sn, r_sd, D, 128, RING)
                y = tl.dot(rows.to(OPERAND), m2_high, y, input_precision="ieee")
                if map_has_low:
                    for k in range(0, DP, KC):
                        chunk = _load_rows(x, ring, token, fresh, slot, kept, k, x_sn, x_sd, r_sn, r_sd, D, KC, RING)
                        _high, rest = _split_map(_load_map(map, k, D, DP, KC), unit, inverse, OPERAND)
                        y = tl.dot(chunk.to(OPERAND), rest, y, input_precision="ieee")
            else:
                y = _mapped(
                    x, ring, token, fresh, slot, kept, x_sn, x_sd, r_sn, r_sd, map, shift, D, DP, KC, RING, OPERAND
                )
            if WHOLE or HALVES:
                if has_shift:
                    y = tl.where((fresh | kept)[:, None], y - shifted[None, :], 0.0)
            at = (tile0 + tile).to(tl.int64)
            tile_ok = tile + tl.arange(0, TILES) < count
            _store_tiles(
                y, unit, words + at * w_st, w_st, scales + at * s_st, s_st, tile_ok, D, BITS, KEY, EDGES, LEVELS
            )


@triton.jit
def _write_exact(
    x, sink, ring, index, ok, before, skip, x_sn, x_sd, k_sn, k_sd, r_sn, r_sd, sinks, capacity,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Copy tokens `index` of x to their sink or ring slot."""
    dims = tl.arange(0, DP)
    live = (dims < D)[None, :]
    t = before + index - skip
    u = t - sinks
    rows = tl.load(x + index[:, None] * x_sn + dims[None, :] * x_sd, mask=ok[:, None] & live)
    to_ring = ring + (u % capacity)[:, None] * r_sn + dims[None, :] * r_sd
    tl.store(to_ring, rows.to(ring.dtype.element_ty), mask=(ok & (u >= 0))[:, None] & live)
    to_sink = sink + t[:, None] * k_sn + dims[None, :] * k_sd
    tl.store(to_sink, rows.to(sink.dtype.element_ty), mask=(ok & (u < 0))[:, None] & live)


@triton.jit(do_not_specialize=["n"])
def write_kernel(
    k, v, k_sinks, v_sinks, k_recent, v_recent, length, start,
    x_sb, x_sh, x_sn, x_sd, k_sb, k_sh, k_sn, k_sd, r_sb, r_sh, r_sn, r_sd,
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
            x_sn, x_sd, k_sn, k_sd, r_sn, r_sd, sinks, capacity, D, DP,
        )  # fmt: skip
    else:
        _write_exact(
            v + at_x, v_sinks + at_sink, v_recent + at_ring, index, ok, before, skip,
            x_sn, x_sd, k_sn, k_sd, r_sn, r_sd, sinks, capacity, D, DP,
        )  # fmt: skip


@triton.jit
def _step_side(
    x, sink, ring, words, scales, map, shift, q, skip, before, old, new, tiles,
    x_sn, x_sd, k_sn, k_sd, r_sn, r_sd, w_st, s_st, sinks, capacity,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, EDGES: tl.constexpr,
    LEVELS: tl.constexpr, Q: tl.constexpr, KC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, Q).to(tl.int64)
    ok = (index >= skip) & (index < q)
    _write_exact(x, sink, ring, index, ok, before, skip, x_sn, x_sd, k_sn, k_sd, r_sn, r_sd, sinks, capacity, D, DP)
    if (new > old) & (old // 32 < tiles):
        u = old + tl.arange(0, 32)
        t = sinks + u
        y = _mapped(
            x, ring, t - before + skip, t >= before, u % capacity, t < before, x_sn, x_sd, r_sn, r_sd,
            map, shift, D, DP, KC, True, OPERAND,
        )  # fmt: skip
        tile = old // 32
        tile_ok = tl.arange(0, 1) == 0
        _store_tiles(
            y, 1.0, words + tile * w_st, w_st, scales + tile * s_st, s_st, tile_ok, D, BITS, KEY, EDGES, LEVELS
        )


@triton.jit(do_not_specialize=["k_tiles", "v_tiles"])
def step_kernel(
    k, v, k_sinks, v_sinks, k_recent, v_recent, k_words, k_scales, v_words, v_scales,
    key_map, key_shift, value_map, value_shift, length, start,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, e_sb, e_sh, e_sn, e_sd, r_sb, r_sh, r_sn, r_sd,
    kw_sb, kw_sh, kw_st, ks_sb, ks_sh, ks_st, vw_sb, vw_sh, vw_st, vs_sb, vs_sh, vs_st,
    heads, q, k_tiles, v_tiles, capacity, sinks, window,
    D: tl.constexpr, DP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_EDGES: tl.constexpr,
    K_LEVELS: tl.constexpr, V_EDGES: tl.constexpr, V_LEVELS: tl.constexpr,
    Q: tl.constexpr, KC: tl.constexpr, OPERAND: tl.constexpr,
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
            k_scales + b * ks_sb + h * ks_sh, key_map + h * D * D, key_shift + h * D, q, skip, before, old, new,
            k_tiles, k_sn, k_sd, e_sn, e_sd, r_sn, r_sd, kw_st, ks_st, sinks, capacity,
            D, DP, K_BITS, True, K_EDGES, K_LEVELS, Q, KC, OPERAND,
        )  # fmt: skip
    else:
        _step_side(
            v + b * v_sb + h * v_sh, v_sinks + at_sink, v_recent + at_ring, v_words + b * vw_sb + h * vw_sh,
            v_scales + b * vs_sb + h * vs_sh, value_map + h * D * D, value_shift + h * D, q, skip, before, old, new,
            v_tiles, v_sn, v_sd, e_sn, e_sd, r_sn, r_sd, vw_st, vs_st, sinks, capacity,
            D, DP, V_BITS, False, V_EDGES, V_LEVELS, Q, KC, OPERAND,
        )  # fmt: skip


def quantizer_constants(book) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Thresholds between ascending magnitudes, and the magnitudes with their index in the low mantissa bits.

    `book` has fields bits and levels (indexed by code).  Empty at 8 bits, whose codes are rounded numbers.
    """
    if book.bits == 8:
        return (), ()
    magnitudes = sorted(x for x in book.levels if x > 0)
    edges = tuple((a + b) / 2 for a, b in itertools.pairwise(magnitudes))
    half = 1 << (book.bits - 1)
    as_int = [struct.unpack("<i", struct.pack("<f", x))[0] for x in magnitudes]
    tagged = tuple(struct.unpack("<f", struct.pack("<i", (w & -half) | i))[0] for i, w in enumerate(as_int))
    return edges, tagged


def _operand() -> tl.dtype:
    return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def _words(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if codes.stride(-1) != 1 or scales.stride(-1) != 1:
        raise ValueError(
            f"expected codes and scales contiguous along their last dimension, got strides {codes.stride()} and "
            f"{scales.stride()}; call .contiguous() on them"
        )
    return codes.view(torch.int32)


def _padded(dim: int) -> int:
    return max(32, triton.next_power_of_2(dim))


def launch_options(dim: int, wide: bool) -> dict[str, int]:
    """Block sizes of `encode_kernel`; wide: a chip with wgmma and more than 200 KiB of shared memory."""
    padded = _padded(dim)
    warps = 4 if padded <= 128 and wide else 8
    return {"TILES": 2, "KC": 32, "num_warps": warps, "num_stages": 2 if padded <= 128 else 1}


def _wide(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _encode_many(x, ring, codes, scales, map, shift, length, start, tiles, sinks, window, key, book):
    """Launch `encode_kernel` over at most `tiles` tiles per row and head."""
    batch, heads, n, dim = x.shape
    words = _words(codes, scales)
    options = launch_options(dim, _wide(x.device))
    blocks = triton.cdiv(tiles, options["TILES"])
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    per_program = max(1, triton.cdiv(blocks * batch * heads, (2 if dim <= 128 else 1) * cores))
    edges, levels = quantizer_constants(book)
    encode_kernel[(batch * heads, triton.cdiv(blocks, per_program))](
        x, ring, words, scales, map, shift, length, start,
        *x.stride(), *(ring.stride() if ring is not None else (0, 0, 0, 0)), *words.stride()[:3], *scales.stride()[:3],
        heads, n, codes.shape[2], ring.shape[2] if ring is not None else 1, sinks, window, per_program,
        D=dim, DP=_padded(dim), BITS=book.bits, KEY=key, EDGES=edges, LEVELS=levels,
        RING=ring is not None, OPERAND=_operand(), **options,
    )  # fmt: skip


def encode(x: torch.Tensor, map: torch.Tensor, shift: torch.Tensor, book) -> tuple[torch.Tensor, torch.Tensor]:
    """Map, quantise and pack x, as `reference.encode`.

    Args:
        x: [B, H, N, D], bf16, fp16 or float32, any strides; the last tile is filled up with zero vectors.
        map, shift: float32 [H, D, D] and [H, D].
        book: codebook with fields bits, role and levels.

    Returns:
        codes uint8 [B, H, T, 32 * D * bits / 8] and scales float16 [B, H, T, 32], T = ceil(N / 32).
    """
    batch, heads, n, dim = x.shape
    tiles = triton.cdiv(n, TILE)
    codes = torch.empty(batch, heads, tiles, TILE * dim * book.bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, heads, tiles, TILE, dtype=torch.float16, device=x.device)
    if codes.numel():
        map, shift = map.contiguous(), shift.contiguous()
        _encode_many(x, None, codes, scales, map, shift, None, None, tiles, 0, 0, book.role == "key", book)
    return codes, scales


def append_(
    k_codes: torch.Tensor, k_scales: torch.Tensor, v_codes: torch.Tensor, v_scales: torch.Tensor,
    k_sinks: torch.Tensor, v_sinks: torch.Tensor, k_recent: torch.Tensor, v_recent: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, length: torch.Tensor, start: torch.Tensor,
    key_map: torch.Tensor, key_shift: torch.Tensor, value_map: torch.Tensor, value_shift: torch.Tensor,
    window: int, key_book, value_book,
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
    if k.dtype != k_recent.dtype or v.dtype != v_recent.dtype:
        raise ValueError(
            f"expected new tokens of the ring's dtype {k_recent.dtype}, got {k.dtype} and {v.dtype}; convert them first"
        )
    maps = [m.contiguous() for m in (key_map, key_shift, value_map, value_shift)]
    padded = _padded(dim)
    if q <= STEP_TOKENS:
        k_words, v_words = _words(k_codes, k_scales), _words(v_codes, v_scales)
        (k_edges, k_levels), (v_edges, v_levels) = quantizer_constants(key_book), quantizer_constants(value_book)
        step_kernel[(batch * heads, 2)](
            k, v, k_sinks, v_sinks, k_recent, v_recent, k_words, k_scales, v_words, v_scales, *maps, length, start,
            *k.stride(), *v.stride(), *k_sinks.stride(), *k_recent.stride(), *k_words.stride()[:3],
            *k_scales.stride()[:3], *v_words.stride()[:3], *v_scales.stride()[:3],
            heads, q, k_codes.shape[2], v_codes.shape[2], capacity, sinks, window,
            D=dim, DP=padded, K_BITS=key_book.bits, V_BITS=value_book.bits, K_EDGES=k_edges, K_LEVELS=k_levels,
            V_EDGES=v_edges, V_LEVELS=v_levels, Q=triton.next_power_of_2(q), KC=32, OPERAND=_operand(),
            num_warps=4, num_stages=1,
        )  # fmt: skip
        return
    tiles = triton.cdiv(q, TILE)
    _encode_many(k, k_recent, k_codes, k_scales, maps[0], maps[1], length, start, tiles, sinks, window, True, key_book)
    _encode_many(
        v, v_recent, v_codes, v_scales, maps[2], maps[3], length, start, tiles, sinks, window, False, value_book
    )
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    rows = 32
    write_kernel[(batch * heads, triton.cdiv(sinks + min(q, capacity), rows), 2)](
        k, v, k_sinks, v_sinks, k_recent, v_recent, length, start, *k.stride(), *k_sinks.stride(), *k_recent.stride(),
        heads, q, capacity, sinks, window, D=dim, DP=padded, ROWS=rows, num_warps=4,
    )  # fmt: skip
