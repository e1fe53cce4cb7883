"""Map, quantise and pack in registers: whole prefills, and the tile that has just left the window.

    y = (x - shift) @ map      c = clamp(floor(y / (sigma * step))) + 1/2      scale = <y, c> / <c, c>

The product runs on tensor cores in two bf16 parts (high + remainder, 17 bits): map = m_hi + m_lo, and x = x_hi + x_lo
unless x is bf16 already; x_lo m_lo is left out.  Maps are divided by their largest entry first, which makes a
randomised Hadamard matrix +-1, and a remainder that is all zero is skipped at run time.  Under the Triton
interpreter, whose bf16 product is wrong, the same parts are multiplied as float32.

Rows and columns of the product are permuted (`_tokens`, `_columns`) so that the accumulator of a tensor-core product
holds whole packed words: with four warps and 128 rows a warp owns a tile, and no code changes its thread.

What is written where is decided on the device from `length` and `start`, so a captured CUDA graph replays correctly.
"""

import torch
import triton
import triton.language as tl

TILE = 32
STEP_TOKENS = 32  # appends up to this long fill at most one tile and cannot overwrite ring slots that are leaving


@triton.jit
def _tokens(TILES: tl.constexpr, KEY: tl.constexpr):
    """Token of each row of a block, int32 [TILES * 32]: rows are (i0 tile i1 g) for keys, (b1 tile b0 j0 t) for values.

    Bits 0-2 of a row are lanes of a warp; bit 3 and, from 128 rows on, the highest bit are registers.
    """
    row = tl.arange(0, TILES * 32)
    lane = row % 8
    near = row // 8 % 2
    tile = row // 16 % TILES
    far = row // (16 * TILES)
    if KEY:
        return tile * 32 + near * 16 + far * 8 + lane
    return tile * 32 + lane // 4 * 16 + far * 8 + lane % 4 * 2 + near


@triton.jit
def _columns(DP: tl.constexpr, KEY: tl.constexpr):
    """Dim of each column, int32 [DP]: columns are (group jj byte1 t byte0) for keys, (group m1 m0 g01 g2) for values.

    Bits 1 and 2 of a column are lanes of a warp, the others are registers.
    """
    column = tl.arange(0, DP)
    low = column % 8
    if KEY:
        return column // 16 * 16 + low // 2 * 4 + column // 8 % 2 * 2 + low % 2
    return column // 8 * 8 + low % 2 * 4 + low // 2


@triton.jit
def _quantize(y, D: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
    """y [N, DP] float32, zero beyond D -> codes and scales.

    Codes are int32 [N, DP], below 8 bits with the exponent of the float they were rounded in (`_store_codes` takes it
    off whole words); scales are float32 [N].
    """
    MAGIC: tl.constexpr = 8388608.0 + (BITS == 1)
    if BITS == 8:
        inverse = 127.0 / tl.maximum(tl.max(tl.abs(y), axis=1), 1e-30)
        rounded = y * inverse[:, None] + 12582912.0  # 1.5 * 2**23: rounds to nearest even
        c = rounded - 12582912.0
        top = 127.0
    else:
        # Level c is (code - TOP / 2), so code = round(clamp(y / (sigma * step) + TOP / 2, 0, TOP)).  Clamping to 0 .. 1
        # costs nothing (a saturating multiply-add), and a tie at y = 0 rounds to the even code, 2 ** (BITS - 1).
        TOP: tl.constexpr = (1 << BITS) - 1
        sigma = tl.sqrt(tl.sum(y * y, axis=1) / D)
        inverse = (1.0 / TOP) / tl.maximum(sigma * STEP, 1e-30)
        share = tl.minimum(tl.maximum(y * inverse[:, None] + 0.5, 0.0), 1.0)
        rounded = share * TOP + MAGIC
        c = (rounded - MAGIC) - 0.5 * TOP
        top = 1.0
    square = tl.sum(c * c, axis=1)
    if BITS < 8:
        square -= 0.25 * (y.shape[1] - D)
    scale = top * tl.sum(y * c, axis=1) / tl.maximum(square, 1e-30)
    codes = rounded.to(tl.int32, bitcast=True)
    return codes & 255 if BITS == 8 else codes, scale


@triton.jit
def _fold(x, SHIFT: tl.constexpr):
    """Pairs in the last dimension -> first + second * 2 ** SHIFT."""
    low, high = tl.split(x)
    return low + high * (1 << SHIFT)


@triton.jit
def _index(N: tl.constexpr, SHAPE: tl.constexpr):
    """0 .. N-1 along the one dimension of SHAPE that is N long, the others being 1."""
    return tl.reshape(tl.arange(0, N), SHAPE)


@triton.jit
def _store_codes(codes, words, tile_stride, left, D: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr):
    """Pack codes of `_quantize` into layout v2 (packing.py): tile i < left of the block at words + i * tile_stride."""
    TILES: tl.constexpr = codes.shape[0] // 32
    R: tl.constexpr = codes.shape[1] // 32
    G: tl.constexpr = D // 32
    # What the constant of every code adds to a word.
    SHARES: tl.constexpr = 0x11111111 if BITS >= 3 else (0x55555555 if BITS == 2 else 0xFFFFFFFF)
    SUM: tl.constexpr = (SHARES * (0x4B000000 + (BITS == 1))) & 0xFFFFFFFF
    OFFSET: tl.constexpr = SUM - ((SUM >> 31) << 32)
    if KEY:  # i0 tile i1 g group jj byte1 t byte0
        x = tl.reshape(codes, [2, TILES, 2, 8, R, 2, 2, 4, 2])
        if BITS == 8:  # -> i1 i0 jj tile g t group byte
            x = _fold(_fold(tl.permute(x, (2, 0, 5, 1, 3, 7, 4, 6, 8)), 8), 16)
            plane = _index(2, [2, 1, 1, 1, 1, 1, 1]) * 4 + _index(2, [2, 1, 1, 1, 1, 1]) * 2
            plane += _index(2, [2, 1, 1, 1, 1])
        elif BITS >= 3:  # -> jj i0 tile g t group nibble
            x = _fold(_fold(_fold(tl.permute(x, (5, 0, 1, 3, 7, 4, 6, 8, 2)), 4), 8), 16)
            plane = _index(2, [2, 1, 1, 1, 1, 1]) * 2 + _index(2, [2, 1, 1, 1, 1])
        else:  # -> jj tile g t group i0 nibble
            x = _fold(_fold(_fold(_fold(tl.permute(x, (5, 1, 3, 7, 4, 0, 6, 8, 2)), 4), 8), 16), BITS)
            plane = _index(2, [2, 1, 1, 1, 1])
            if BITS == 1:
                x = _fold(tl.permute(x, (1, 2, 3, 4, 0)), 2)
                plane = 0
        lane = _index(8, [8, 1, 1]) * 4 + _index(4, [4, 1])
        tile = _index(TILES, [TILES, 1, 1, 1])
    else:  # b1 tile b0 j0 t group m1 m0 g01 g2
        x = tl.reshape(codes, [2, TILES, 2, 2, 4, R, 2, 2, 4, 2])
        plane = _index(2, [2, 1, 1, 1])  # j0
        if BITS == 8:  # -> m1 m0 g2 tile j0 t g01 group byte
            x = _fold(_fold(tl.permute(x, (6, 7, 9, 1, 3, 4, 8, 5, 0, 2)), 8), 16)
            plane += _index(2, [2, 1, 1, 1, 1, 1, 1, 1]) * 4 + _index(2, [2, 1, 1, 1, 1, 1, 1]) * 2
        elif BITS >= 3:  # -> b1 g2 tile j0 t g01 group nibble
            x = _fold(_fold(_fold(tl.permute(x, (0, 9, 1, 3, 4, 8, 5, 2, 7, 6)), 4), 8), 16)
            plane = plane * 2 + _index(2, [2, 1, 1, 1, 1, 1, 1])
        else:  # -> g2 tile j0 t g01 group m0 nibble
            x = _fold(_fold(_fold(_fold(tl.permute(x, (9, 1, 3, 4, 8, 5, 7, 2, 0, 6)), 4), 8), 16), BITS)
            if BITS == 1:
                x = tl.sum(x << (2 * plane), axis=2, keep_dims=True)
                plane = 0
        lane = _index(4, [4, 1, 1]) + _index(4, [4, 1]) * 4 + _index(2, [2, 1, 1, 1, 1, 1]) * 16
        tile = _index(TILES, [TILES, 1, 1, 1, 1])
    group = tl.arange(0, R)
    if BITS < 8:
        x -= OFFSET
    ok = (tile < left) & (group < G)
    if BITS == 3:
        spare = tl.where(plane == 3, x, 0)
        spare = tl.sum(tl.sum(spare, axis=0, keep_dims=True), axis=1 if KEY else 3, keep_dims=True)
        x = (x << 1) | ((spare >> (2 - tl.minimum(plane, 2))) & 0x11111111)
        ok &= plane < 3
    if KEY and BITS > 1 and BITS < 8:
        x ^= -2139062144
        if BITS == 3:
            x ^= tl.where(plane == 0, 0x10101010, 0)
    at = words + tile.to(tl.int64) * tile_stride + ((plane * 32 + lane) * G + group)
    tl.store(at, x, mask=ok)


@triton.jit
def _store_tiles(
    y, unit, words, tile_stride, scales, scale_stride, left,
    D: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Quantise y [TILES * 32, DP] and store the first `left` tiles; `unit` is the factor y still lacks."""
    codes, scale = _quantize(y, D, BITS, STEP)
    _store_codes(codes, words, tile_stride, left, D, BITS, KEY)
    scale = tl.abs(scale * unit)  # negative only where the squares of y overflow
    scale = tl.where(scale < float("inf"), tl.minimum(scale, 65504.0), float("nan"))
    token = _tokens(y.shape[0] // 32, KEY)
    at = scales + (token // 32).to(tl.int64) * scale_stride + token % 32
    tl.store(at, scale.to(tl.float16), mask=token // 32 < left)


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
def _load_map(map, first, columns, D: tl.constexpr, ROWS: tl.constexpr):
    """Rows first .. first + ROWS - 1 and the given columns of a map, float32 [ROWS, DP], zero beyond D."""
    rows = first + tl.arange(0, ROWS)
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
    x, ring, token, fresh, slot, kept, x_sn, x_sd, r_sn, r_sd, map, shift, columns,
    D: tl.constexpr, DP: tl.constexpr, KC: tl.constexpr, RING: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y [N, DP] = (rows - shift) @ map[:, columns], the map streamed KC rows at a time."""
    y = tl.zeros([token.shape[0], DP], tl.float32)
    for first in range(0, DP, KC):
        rows = _load_rows(x, ring, token, fresh, slot, kept, first, x_sn, x_sd, r_sn, r_sd, D, KC, RING)
        offset = tl.load(shift + first + tl.arange(0, KC), mask=first + tl.arange(0, KC) < D, other=0.0)
        delta = tl.where((fresh | kept)[:, None], rows.to(tl.float32) - offset[None, :], 0.0)
        x_high, x_low = _split(delta, OPERAND)
        m_high, m_low = _split_map(_load_map(map, first, columns, D, KC), 1.0, 1.0, OPERAND)
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
    STEP: tl.constexpr, TILES: tl.constexpr, KC: tl.constexpr, RING: tl.constexpr, OPERAND: tl.constexpr,
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
        order = _tokens(TILES, KEY)
        columns = _columns(DP, KEY)
        unit = 0.0 if HALVES else 1.0
        if WHOLE or HALVES:
            dims = tl.arange(0, DP)
            # (x - shift) @ map = x @ map - shift @ map; with the same two parts of the map in both, what they
            # leave out multiplies x - shift only.
            has_shift = tl.max(tl.abs(tl.load(shift + dims, mask=dims < D, other=0.0)), axis=0) > 0
            if WHOLE:
                m = _load_map(map, 0, columns, D, DP)
                unit = _largest(m)
                inverse = tl.where(unit > 0, 1.0 / unit, 0.0)
                m_high, m_low = _split_map(m, unit, inverse, OPERAND)
                map_has_low = _largest(m_low) > 0
            else:
                for k in range(0, DP, KC):
                    unit = tl.maximum(unit, _largest(_load_map(map, k, columns, D, KC)))
                inverse = tl.where(unit > 0, 1.0 / unit, 0.0)
                remainder = 0.0
                for k in range(0, DP, KC):
                    _chunk, chunk_low = _split_map(_load_map(map, k, columns, D, KC), unit, inverse, OPERAND)
                    remainder = tl.maximum(remainder, _largest(chunk_low))
                map_has_low = remainder > 0
                m_high, _low = _split_map(_load_map(map, 0, columns, D, 128), unit, inverse, OPERAND)
                m2_high, _low2 = _split_map(_load_map(map, 128, columns, D, 128), unit, inverse, OPERAND)
            shifted = tl.zeros([DP], tl.float32)
            if has_shift:
                for k in range(0, DP, KC):
                    high, low = _split_map(_load_map(map, k, columns, D, KC), unit, inverse, OPERAND)
                    part = tl.load(shift + k + tl.arange(0, KC), mask=k + tl.arange(0, KC) < D, other=0.0)
                    shifted += tl.sum(part[:, None] * (high.to(tl.float32) + low.to(tl.float32)), axis=0)
        for block in range(first, last):
            tile = block * TILES
            row_ok = tile + order // 32 < count
            if RING:
                t = sinks + (tile0 + tile) * 32 + order
                fresh = row_ok & (t >= before)
                kept = row_ok & (t < before)
                token = t - before + skip
                slot = (t - sinks) % capacity
            else:
                token = tile.to(tl.int64) * 32 + order
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
                        _high, rest = _split_map(_load_map(map, k, columns, D, KC), unit, inverse, OPERAND)
                        y = tl.dot(chunk.to(OPERAND), rest, y, input_precision="ieee")
            else:
                y = _mapped(
                    x, ring, token, fresh, slot, kept, x_sn, x_sd, r_sn, r_sd, map, shift, columns,
                    D, DP, KC, RING, OPERAND,
                )  # fmt: skip
            if WHOLE or HALVES:
                if has_shift:
                    y = tl.where((fresh | kept)[:, None], y - shifted[None, :], 0.0)
            at = (tile0 + tile).to(tl.int64)
            _store_tiles(y, unit, words + at * w_st, w_st, scales + at * s_st, s_st, count - tile, D, BITS, KEY, STEP)


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
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, STEP: tl.constexpr, Q: tl.constexpr,
    KC: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, Q).to(tl.int64)
    ok = (index >= skip) & (index < q)
    _write_exact(x, sink, ring, index, ok, before, skip, x_sn, x_sd, k_sn, k_sd, r_sn, r_sd, sinks, capacity, D, DP)
    if (new > old) & (old // 32 < tiles):
        u = old + _tokens(1, KEY)
        t = sinks + u
        y = _mapped(
            x, ring, t - before + skip, t >= before, u % capacity, t < before, x_sn, x_sd, r_sn, r_sd,
            map, shift, _columns(DP, KEY), D, DP, KC, True, OPERAND,
        )  # fmt: skip
        tile = old // 32
        _store_tiles(y, 1.0, words + tile * w_st, w_st, scales + tile * s_st, s_st, 1, D, BITS, KEY, STEP)


@triton.jit(do_not_specialize=["k_tiles", "v_tiles"])
def step_kernel(
    k, v, k_sinks, v_sinks, k_recent, v_recent, k_words, k_scales, v_words, v_scales,
    key_map, key_shift, value_map, value_shift, length, start,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, e_sb, e_sh, e_sn, e_sd, r_sb, r_sh, r_sn, r_sd,
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
            k_scales + b * ks_sb + h * ks_sh, key_map + h * D * D, key_shift + h * D, q, skip, before, old, new,
            k_tiles, k_sn, k_sd, e_sn, e_sd, r_sn, r_sd, kw_st, ks_st, sinks, capacity,
            D, DP, K_BITS, True, K_STEP, Q, KC, OPERAND,
        )  # fmt: skip
    else:
        _step_side(
            v + b * v_sb + h * v_sh, v_sinks + at_sink, v_recent + at_ring, v_words + b * vw_sb + h * vw_sh,
            v_scales + b * vs_sb + h * vs_sh, value_map + h * D * D, value_shift + h * D, q, skip, before, old, new,
            v_tiles, v_sn, v_sd, e_sn, e_sd, r_sn, r_sd, vw_st, vs_st, sinks, capacity,
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
    encode_kernel[(batch * heads, triton.cdiv(blocks, per_program))](
        x, ring, words, scales, map, shift, length, start,
        *x.stride(), *(ring.stride() if ring is not None else (0, 0, 0, 0)), *words.stride()[:3], *scales.stride()[:3],
        heads, n, codes.shape[2], ring.shape[2] if ring is not None else 1, sinks, window, per_program,
        D=dim, DP=_padded(dim), BITS=book.bits, KEY=key, STEP=book.step,
        RING=ring is not None, OPERAND=_operand(), **options,
    )  # fmt: skip


def encode(
    x: torch.Tensor, map: torch.Tensor, shift: torch.Tensor, book, role: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map, quantise and pack x, as `reference.encode`.

    Args:
        x: [B, H, N, D], bf16, fp16 or float32, any strides; the last tile is filled up with zero vectors.
        map, shift: float32 [H, D, D] and [H, D].
        book: codebook with fields bits and step.
        role: "key" or "value".

    Returns:
        codes uint8 [B, H, T, 32 * D * bits / 8] and scales float16 [B, H, T, 32], T = ceil(N / 32).
    """
    batch, heads, n, dim = x.shape
    tiles = triton.cdiv(n, TILE)
    codes = torch.empty(batch, heads, tiles, TILE * dim * book.bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, heads, tiles, TILE, dtype=torch.float16, device=x.device)
    if codes.numel():
        map, shift = map.contiguous(), shift.contiguous()
        _encode_many(x, None, codes, scales, map, shift, None, None, tiles, 0, 0, role == "key", book)
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
        step_kernel[(batch * heads, 2)](
            k, v, k_sinks, v_sinks, k_recent, v_recent, k_words, k_scales, v_words, v_scales, *maps, length, start,
            *k.stride(), *v.stride(), *k_sinks.stride(), *k_recent.stride(), *k_words.stride()[:3],
            *k_scales.stride()[:3], *v_words.stride()[:3], *v_scales.stride()[:3],
            heads, q, k_codes.shape[2], v_codes.shape[2], capacity, sinks, window,
            D=dim, DP=padded, K_BITS=key_book.bits, V_BITS=value_book.bits, K_STEP=key_book.step,
            V_STEP=value_book.step, Q=triton.next_power_of_2(q), KC=32, OPERAND=_operand(),
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
