"""Map, quantise and pack many tiles in registers: whole prefills, and what leaves the window with a long append.

    y = (x - shift) @ map      c = clamp(floor(y / (sigma * step))) + 1/2      scale = <y, c> / <c, c>

With error feedback the even dims of y are quantised first and the odd ones make up for their error (`pack.quantize`).
What is written where is decided on the device from `length` and `start`, so a captured CUDA graph replays correctly.
"""

import torch
import triton
import triton.language as tl

from .chip import is_hopper, launches_early, multiprocessors, shared_kib
from .mapped import mapped, mapped_here, shift_rows
from .operands import feedback_at, load_remainder, load_shift, load_square, padded_dim, prepared, size
from .pack import get_words, put_scales, put_words, quantize, token_order

TILE = 32
RESIDENT = {32: 4, 64: 4, 128: 2}  # programs to a multiprocessor; larger dims: 1
MANY_TILES = 4  # fewer are no whole block of `encode_gluon`
WIDE = 200  # KiB of shared memory: a chip with wgmma or tcgen05


@triton.jit
def counts(length, start, b, q, sinks, window):
    """Of row b: padding tokens among the q new ones, real tokens before, packed tokens before and after."""
    seen = tl.load(length).to(tl.int64)
    first = tl.load(start + b).to(tl.int64)
    skip = tl.minimum(tl.maximum(first - seen, 0), q)
    before = tl.maximum(seen - first, 0)
    old = tl.maximum(before - sinks - window, 0) // 32 * 32
    new = tl.maximum(before + q - skip - sinks - window, 0) // 32 * 32
    return skip, before, old, new


@triton.jit
def whole_blocks(fresh, count, TILES: tl.constexpr):
    """Blocks begin .. end - 1 are whole and all in x: of `count` tiles, those from row `fresh` on."""
    begin = tl.maximum((fresh + TILES * 32 - 1) // (TILES * 32), 0)
    return begin, tl.maximum(count // TILES, begin)


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
        row = tl.arange(0, words0.shape[0])[:, None]
        column = tl.arange(0, words0.shape[1])[None, :]
        put_words(words0, words1, row, column, words + at * w_st, w_st, left, D, TILES, BITS, KEY)
        put_scales(scale0, unit, scales + at * s_st, s_st, order, left)
        put_scales(scale1, unit, scales + at * s_st, s_st, order + 8, left)
    return words1, scale1


@triton.jit(do_not_specialize=["n", "tiles"])
def encode_kernel(
    x, ring, words, scales, map, shift, operands, length, start,
    x_sb, x_sh, x_sn, r_sb, r_sh, r_sn, w_sb, w_sh, w_st, s_sb, s_sh, s_st,
    heads, n, tiles, capacity, sinks, window, blocks,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr, STEP: tl.constexpr,
    FEEDBACK: tl.constexpr, TILES: tl.constexpr, KC: tl.constexpr, HALVES: tl.constexpr, RING: tl.constexpr,
    OPERAND: tl.constexpr, SHIFT_ROWS: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Encode many tiles of one side (keys or values).

    RING False: tile i is tokens 32 i .. 32 i + 31 of x, of which n exist.  RING True: x holds the n tokens of an
    append, and the tiles are those that leave the window with it; tokens older than x are in the ring.

    Grid: (B * H, chunks); a program encodes up to `blocks` blocks of TILES tiles, half a block (16 tokens of each tile)
    at a time.  A map in one bf16 part stays in shared memory for whole blocks (HERE: up to D = 128; at D = 256, for a
    bf16 x, where it fits: HALVES); others are streamed.  SHIFT_ROWS: the shift is three rows more of the product.
    operands: of `prepare`, with FEEDBACK or without.

    REST: whole blocks that meet a map in one part are left to the launch that follows.
    PDL: begins while the launch before ends, and lets the next one begin after that: `gluon_encode_kernel` reads x
    without a wait of its own.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    x += b * x_sb + h * x_sh
    words += b * w_sb + h * w_sh
    scales += b * s_sb + h * s_sh
    map += h * D * D
    shift += h * D
    operands += h * size(DP, FEEDBACK)
    if RING:
        ring += b * r_sb + h * r_sh
        skip, before, old, new = counts(length, start, b, n, sinks, window)
        tile0 = old // 32
        count = (tl.minimum(new // 32, tiles) - tile0).to(tl.int32)
        # Rows at `old` + i of the packed sequence are in x from i = fresh on, and in the ring before that.
        fresh = (before - sinks - old).to(tl.int32)
        whole = count
        x -= (fresh - skip) * x_sn
        slot0 = (old % capacity).to(tl.int32)
        words += tile0 * w_st
        scales += tile0 * s_st
    else:
        count = (n + 31) // 32
        fresh = 0
        whole = n // 32
    HERE: tl.constexpr = (DP <= 128 or (HALVES and x.dtype.element_ty == tl.bfloat16)) and not REST
    first = tl.program_id(1) * blocks
    last = tl.minimum(first + blocks, (count + TILES - 1) // TILES)
    # Blocks begin .. end - 1 are whole and all in x, and meet a map in one part; others stream the map, with masks.
    begin = last
    end = last
    if HERE or REST:
        if load_remainder(operands, DP, FEEDBACK) == 0:
            begin, end = whole_blocks(fresh, whole, TILES)
            begin = tl.minimum(tl.maximum(begin, first), last)
            end = tl.minimum(tl.maximum(end, begin), last)
    if first < last - (end - begin if REST else 0):
        order = token_order(TILES, KEY)
        operand = None
        if FEEDBACK:
            operand = load_square(operands + feedback_at(DP), DP // 2, DP // 2, OPERAND)
        if HERE:
            # (x - shift) @ map = x @ map - shift @ map
            minus, unit = load_shift(operands, DP, FEEDBACK)
            if SHIFT_ROWS:
                minus = shift_rows(minus, tl.arange(0, 16)[:, None]).to(OPERAND)
            m = load_square(operands, min(DP, 128), DP, OPERAND)
            m2 = None
            if DP > 128:
                m2 = load_square(operands + 128 * DP, 128, DP, OPERAND)
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
            y = mapped(rows, ok, map, shift, D, DP, KEY, FEEDBACK, KC, OPERAND)
            words0, scale0 = _put_half(
                y, operand, words0, scale0, half, 1.0, words, scales, w_st, s_st, order, tile, left,
                D, BITS, KEY, STEP, TILES, OPERAND,
            )  # fmt: skip
        if HERE:
            rows = x + order * x_sn
            for half in range(2 * begin, 2 * end):
                tile = half // 2 * TILES
                here = rows + (tile * 32 + half % 2 * 8).to(tl.int64) * x_sn
                y = mapped_here(here, minus, m, m2, D, DP, OPERAND)
                words0, scale0 = _put_half(
                    y, operand, words0, scale0, half, unit, words, scales, w_st, s_st, order, tile, TILES,
                    D, BITS, KEY, STEP, TILES, OPERAND,
                )  # fmt: skip


def operand_type() -> tl.dtype:
    return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def as_words(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if codes.stride(-1) != 1 or scales.stride(-1) != 1:
        raise ValueError(
            f"expected codes and scales contiguous along their last dimension, got strides {codes.stride()} and "
            f"{scales.stride()}; call .contiguous() on them"
        )
    return codes.view(torch.int32)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_options(dim: int, shared: int, feedback: bool, rest: bool = False) -> dict[str, int]:
    """Block sizes of `encode_kernel` on a chip with `shared` KiB of shared memory in a multiprocessor.

    rest: for what `encode_gluon` leaves.
    """
    wide = shared >= WIDE
    options = {"TILES": 4, "KC": 32, "num_warps": 4 if wide else 8, "HALVES": False, "REST": rest}
    options["SHIFT_ROWS"] = wide and dim != 128 and not rest
    if rest:
        return {**options, "num_stages": 2}
    if dim > 256:  # what one block of 128 tokens has to exchange would not fit
        return {**options, "TILES": 2, "num_warps": 8, "num_stages": 1}
    if dim > 128:
        if dim < 256 or shared < (WIDE if feedback else 160):
            return {**options, "num_stages": 2 if wide else 1}
        if feedback:  # no room for two stages of rows: twice the rows and warps instead
            return {**options, "HALVES": True, "TILES": 8, "num_warps": 8, "num_stages": 1}
        return {**options, "HALVES": True, "num_stages": 2 if wide else 1}
    return {**options, "num_stages": 3 if wide or dim in (32, 64) else 2}


def runs_gluon(x: torch.Tensor) -> bool:
    """Whether whole blocks of x are encoded by `encode_gluon`: bf16 of 256 dims, on Hopper, in rows that are
    16-byte aligned and a multiple of 32 bytes apart."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3])
    return is_hopper(x.device) and aligned and x.shape[-1] == 256 and x.dtype == torch.bfloat16


def encode_many(
    x, ring, codes, scales, map, shift, feedback, operands, length, start, tiles, sinks, window, role, book,
    gluon: bool,
):  # fmt: skip
    """Launch the kernels over at most `tiles` tiles per row and head; gluon: that one too, where it runs."""
    batch, heads, n, dim = x.shape
    operands = prepared(operands, map, shift, feedback, role)
    words = as_words(codes, scales)
    rest = gluon and tiles >= MANY_TILES and runs_gluon(x)
    options = launch_options(dim, shared_kib(x.device), feedback is not None, rest)
    blocks = triton.cdiv(tiles, options["TILES"])
    cores = multiprocessors(x.device)
    per_program = max(1, triton.cdiv(blocks * batch * heads, RESIDENT.get(padded_dim(dim), 1) * cores))
    pdl = launches_early(x.device)
    encode_kernel[(batch * heads, triton.cdiv(blocks, per_program))](
        x, ring, words, scales, map, shift, operands, length, start,
        *x.stride()[:3], *(ring.stride()[:3] if ring is not None else (0, 0, 0)), *words.stride()[:3],
        *scales.stride()[:3],
        heads, n, codes.shape[2], ring.shape[2] if ring is not None else 1, sinks, window, per_program,
        D=dim, DP=padded_dim(dim), BITS=book.bits, KEY=role == "key", STEP=book.step,
        FEEDBACK=feedback is not None, RING=ring is not None, OPERAND=operand_type(), PDL=pdl, **options,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    if rest:
        from .encode_gluon import gluon_encode_kernel  # where it runs: Gluon has no interpreter

        gluon_encode_kernel[(batch * heads, min(blocks, max(1, cores // (batch * heads))))](
            x, words, scales, operands, length, start, *x.stride()[:3], *words.stride()[:3], *scales.stride()[:3],
            heads, n, codes.shape[2], sinks, window,
            D=dim, BITS=book.bits, KEY=role == "key", STEP=book.step, FEEDBACK=feedback is not None,
            RING=ring is not None, num_warps=4, launch_pdl=True,
        )  # fmt: skip


def encode(
    x: torch.Tensor, map: torch.Tensor, shift: torch.Tensor, book, role: str, feedback: torch.Tensor | None = None,
    operands: torch.Tensor | None = None, impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Map, quantise and pack x, as `reference.encode`.

    Args:
        x: [B, H, N, D], bf16, fp16 or float32, any strides; the last tile is filled up with zero vectors.
        map, shift: float32 [H, D, D] and [H, D].
        book: codebook with fields bits and step.
        role: "key" or "value".
        feedback: float32 [H, D / 2, D / 2], multiplied as bf16, or None.
        operands: what `prepare` makes of map, shift and feedback, or None: made here, one launch more.
        impl: "gluon" (whole blocks of bf16 vectors of 256 dims, on Hopper), "triton", or "auto": the first that runs.

    Returns:
        codes uint8 [B, H, T, 32 * D * bits / 8] and scales float16 [B, H, T, 32], T = ceil(N / 32).

    Raises:
        ValueError: operands of other maps, by their shape or type, or impl="gluon" where it does not run.
    """
    batch, heads, n, dim = x.shape
    x = unit_stride(x)
    tiles = triton.cdiv(n, TILE)
    if impl == "gluon" and (tiles < MANY_TILES or not runs_gluon(x)):
        raise ValueError(
            f"impl='gluon' encodes {32 * MANY_TILES} bfloat16 vectors of 256 dims or more, in 16-byte aligned rows, on "
            f"Hopper, got {n} in {x.dtype} of {dim} dims, strides {x.stride()}, on {x.device}; use impl='triton'"
        )
    codes = torch.empty(batch, heads, tiles, TILE * dim * book.bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, heads, tiles, TILE, dtype=torch.float16, device=x.device)
    if codes.numel():
        map, shift = map.contiguous(), shift.contiguous()
        encode_many(
            x, None, codes, scales, map, shift, feedback, operands, None, None, tiles, 0, 0, role, book,
            gluon=impl != "triton",
        )  # fmt: skip
    return codes, scales
