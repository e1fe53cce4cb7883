"""`encode` for bf16 tokens of 256 dims on chips with wgmma (sm_90), where one program fills a multiprocessor.

Its two warp groups (`warp_specialize`) share the map in shared memory and have a buffer of tokens each, of which the
next are sent for as soon as a product has read these.  They take turns at the tensor cores: one multiplies while the
other rounds.  Only whole blocks that meet a map in one part are encoded here; `encode_kernel` does the others (REST)
in a launch before this one, which this one does not wait for until its end.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

from .encode import counts, whole_blocks
from .gluon_basics import async_load, barrier, launch_next, wait_for_previous
from .mapped import shift_rows
from .operands import feedback_at, shift_at, size, unit_at
from .pack import (
    codes_of,
    get_words,
    inverse_step,
    join_halves,
    put_scales,
    put_words,
    quantize,
    round_even,
    round_odd,
    token_of,
)  # fmt: skip

GROUPS = gl.constexpr(2)
REGISTERS = gl.constexpr(240)  # of a thread of the second group; the first has as many
TILES = gl.constexpr(4)  # of a block; half a block is 64 rows
# Tokens are copied 16 bytes to a lane and instruction, one row of 256 dims to a warp, which has 16 consecutive rows.
_DIMS = [[0, 8], [0, 16], [0, 32], [0, 64], [0, 128]]
_EIGHT, _ROWS, _WARPS = [[0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0], [4, 0], [8, 0]], [[16, 0], [32, 0]]
NEAR = gl.constexpr(gl.DistributedLinearLayout(_EIGHT + _ROWS, _DIMS, _WARPS, [], [64, 256]))


@triton.constexpr_function
def _columns_first(layout):
    """The layout with registers in the order of columns, then rows: what one instruction stores is adjacent."""
    return gl.DistributedLinearLayout(
        sorted(layout.reg_bases), layout.lane_bases, layout.warp_bases, layout.block_bases, layout.shape
    )


@gluon.jit
def _copy(to, at, N: gl.constexpr):
    """Send for a bf16 matrix [N, N]."""
    LANES: gl.constexpr = N // 8
    L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    column = gl.arange(0, N, gl.SliceLayout(0, L))[None, :]
    for first in gl.static_range(0, N, 64):
        row = first + gl.arange(0, 64, gl.SliceLayout(1, L))[:, None]
        async_load(to.slice(first, 64), at + row * N + column)


@gluon.jit
def _put_shift(to, minus, D: gl.constexpr):
    """Write `shift_rows` of minus float32 [D] to shared memory [16, D]."""
    L: gl.constexpr = gl.BlockedLayout([16, 2], [1, 32], [1, 4], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, L))[:, None]
    to.store(shift_rows(gl.load(minus + gl.arange(0, D, gl.SliceLayout(0, L))), row))


@gluon.jit
def _send_for(to, x, block, half, again, x_sn, D: gl.constexpr, KEY: gl.constexpr):
    """Send for the rows of half a block.  again: zero, as in `_encode_blocks`."""
    order = token_of(gl.arange(0, 64, gl.SliceLayout(1, NEAR)), KEY)
    dims = gl.arange(0, D, gl.SliceLayout(0, NEAR))
    token = block * (32 * TILES) + half * 8
    offset = order * gl.multiple_of(x_sn ^ again, 16)
    async_load(to, x + token.to(gl.int64) * x_sn + (offset[:, None] + dims[None, :]))


@gluon.jit
def _words_with_feedback(
    y, feedback, D: gl.constexpr, BITS: gl.constexpr, KEY: gl.constexpr, STEP: gl.constexpr, HALF_L: gl.constexpr
):
    """`get_words` and scales of y [64, D] as of `quantize`; even dims become words before the odd ones are rounded,
    which saves registers."""
    even, odd = gl.split(gl.permute(gl.reshape(y, [y.shape[0], 2, y.shape[1] // 2]), (0, 2, 1)))
    even = gl.convert_layout(even, HALF_L, assert_trivial=True)
    odd = gl.convert_layout(odd, HALF_L, assert_trivial=True)
    inverse = inverse_step(y, D, BITS, STEP)
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, HALF_L), assert_trivial=True)
    rounded, error, step, product, square = round_even(even, inverse, D, BITS, True)
    codes = codes_of(rounded, BITS)
    words = get_words(join_halves(codes, gl.zeros_like(codes)), BITS, KEY)
    error = gl.convert_layout(error.to(gl.bfloat16), gl.DotOperandLayout(0, HALF_L, 2), assert_trivial=True)
    # A product of its own: into a part of the accumulator ptxas runs them one by one.
    odd -= warpgroup_mma(error, feedback, gl.zeros(odd.shape, gl.float32, HALF_L), use_acc=False)
    rounded, product1, square1 = round_odd(odd, step, D, BITS, True)
    codes = codes_of(rounded, BITS)
    words += get_words(join_halves(gl.zeros_like(codes), codes), BITS, KEY)
    return words, (product + product1) / (square + square1)


@gluon.jit
def _encode_blocks(
    x, words, scales, shift, unit, m, f, buffer, mine, other, first, last, x_sn, w_st, s_st,
    GROUP: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, KEY: gl.constexpr, STEP: gl.constexpr,
    FEEDBACK: gl.constexpr,
):  # fmt: skip
    """Every second block of first .. last - 1: what one warp group does."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    HALF_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    ONES: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    SCALE: gl.constexpr = gl.SliceLayout(1, HALF_L if FEEDBACK else ACC)
    none = gl.zeros([64, D], gl.int32, ACC)
    if FEEDBACK:
        half_none = gl.zeros([64, D // 2], gl.int32, HALF_L)
        none = join_halves(half_none, half_none)
    words0 = get_words(none, BITS, KEY)
    L: gl.constexpr = _columns_first(words0.type.layout)
    words0 = gl.convert_layout(words0, L, assert_trivial=True)
    scale0 = gl.zeros([64], gl.float32, SCALE)
    block = first + GROUP
    halves = gl.maximum((last - block + GROUPS - 1) // GROUPS, 0) * 2
    theirs = gl.maximum((last - (first + 1 - GROUP) + GROUPS - 1) // GROUPS, 0) * 2
    for i in range(halves):
        # Zero, which compilers do not know: what is computed from it stays in the loop, and out of registers.
        again = i >> 30
        tokens = buffer.index(again)
        map_here = m.index(again)
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        # (x - shift) @ map = x @ map - shift @ map
        if FEEDBACK:  # where there is no room for the other form, which is faster
            minus = gl.load(shift + gl.arange(0, D, gl.SliceLayout(0, ACC)))
            y = gl.broadcast(minus[None, :], gl.zeros([64, D], gl.float32, ACC))[0]
        if i - (1 - GROUP) < theirs:
            mbarrier.wait(mine, i & 1 ^ 1 - GROUP)
        if not FEEDBACK:
            three = gl.arange(0, 16, gl.SliceLayout(0, ONES))[None, :] < gl.full([64, 1], 3, gl.int32, ONES)
            ones = gl.where(three, 1.0, 0.0).to(gl.bfloat16)
            y = gl.zeros([64, D], gl.float32, ACC)
            y = warpgroup_mma(ones, shift.index(again), y, use_acc=False, is_async=True)
        y = warpgroup_mma(tokens, map_here, y, is_async=True)
        mbarrier.arrive(other)
        y, _tokens, _map = warpgroup_mma_wait(0, deps=[y, tokens, map_here])
        barrier()
        following = i + 1
        if following < halves:
            _send_for(tokens, x, block + following // 2 * GROUPS, following % 2, again, x_sn, D, KEY)
        async_copy.commit_group()
        if FEEDBACK:
            words1, scale1 = _words_with_feedback(y, f.index(again), D, BITS, KEY, STEP, HALF_L)
        else:
            codes, scale1 = quantize(y, None, D, BITS, STEP, gl.bfloat16)
            words1 = get_words(codes, BITS, KEY)
        words1 = gl.convert_layout(words1, L, assert_trivial=True)
        if i % 2 == 1:
            at = ((block + i // 2 * GROUPS) * TILES).to(gl.int64)
            row = gl.arange(0, words0.shape[0], gl.SliceLayout(1, L))[:, None]
            column = gl.arange(0, words0.shape[1], gl.SliceLayout(0, L))[None, :]
            order = token_of(gl.arange(0, 64, SCALE), KEY) ^ again
            put_scales(scale0, unit, scales + at * s_st, s_st, order, TILES)
            put_scales(scale1, unit, scales + at * s_st, s_st, order + 8, TILES)
            put_words(words0, words1, row, column, words + at * w_st, w_st, TILES, D, TILES, BITS, KEY)
        words0 = words1
        scale0 = scale1


@gluon.jit(do_not_specialize=["n", "tiles"])
def gluon_encode_kernel(
    x, words, scales, operands, length, start,
    x_sb, x_sh, x_sn, w_sb, w_sh, w_st, s_sb, s_sh, s_st,
    heads, n, tiles, sinks, window,
    D: gl.constexpr, BITS: gl.constexpr, KEY: gl.constexpr, STEP: gl.constexpr, FEEDBACK: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """Arguments of `encode_kernel`, x aligned as `encode.runs_gluon` says.

    Grid: (B * H, chunks); a program has its share of the whole blocks of a head.
    """
    HALF: gl.constexpr = D // 2
    launch_next()
    b = (gl.program_id(0) // heads).to(gl.int64)
    h = (gl.program_id(0) % heads).to(gl.int64)
    x += b * x_sb + h * x_sh
    words += b * w_sb + h * w_sh
    scales += b * s_sb + h * s_sh
    operands += h * size(D, FEEDBACK)
    fresh = 0
    count = n // 32
    if RING:
        skip, before, old, new = counts(length, start, b, n, sinks, window)
        count = (gl.minimum(new // 32, tiles) - old // 32).to(gl.int32)
        fresh = (before - sinks - old).to(gl.int32)
        x -= (fresh - skip) * x_sn
        words += old // 32 * w_st
        scales += old // 32 * s_st
    begin, end = whole_blocks(fresh, count, TILES)
    minus = (operands + shift_at(D, FEEDBACK)).to(gl.pointer_type(gl.float32))
    last_section = operands + unit_at(D, FEEDBACK)
    unit = gl.load(last_section.to(gl.pointer_type(gl.float32)))
    remainder = gl.load(last_section.to(gl.pointer_type(gl.int32)) + 1)
    first = begin + (end - begin) * gl.program_id(1) // gl.num_programs(1)
    last = begin + (end - begin) * (gl.program_id(1) + 1) // gl.num_programs(1)

    m = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], gl.NVMMASharedLayout.get_default_for([D, D], gl.bfloat16))
    f = m
    if FEEDBACK:
        f = gl.allocate_shared_memory(
            gl.bfloat16, [1, HALF, HALF], gl.NVMMASharedLayout.get_default_for([HALF, HALF], gl.bfloat16)
        )
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], gl.bfloat16)
    buffer0 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, D], ROWS)
    buffer1 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, D], ROWS)
    shift = minus
    if not FEEDBACK:
        shift = gl.allocate_shared_memory(
            gl.bfloat16, [1, 16, D], gl.NVMMASharedLayout.get_default_for([16, D], gl.bfloat16)
        )
    if first < last:
        _send_for(buffer0.index(0), x, first, 0, 0, x_sn, D, KEY)
        if first + 1 < last:
            _send_for(buffer1.index(0), x, first + 1, 0, 0, x_sn, D, KEY)
        _copy(m.index(0), operands, D)
        if FEEDBACK:
            _copy(f.index(0), operands + feedback_at(D), HALF)
        else:
            _put_shift(shift.index(0), minus, D)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    turn0 = turns.index(0)
    turn1 = turns.index(1)
    mbarrier.init(turn0, count=1)
    mbarrier.init(turn1, count=1)
    async_copy.commit_group()
    last = gl.where(remainder == 0, last, first)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                _encode_blocks,
                (x, words, scales, shift, unit, m, f, buffer0, turn0, turn1, first, last, x_sn, w_st, s_st,
                 0, D, BITS, KEY, STEP, FEEDBACK),
            ),
            (
                _encode_blocks,
                (x, words, scales, shift, unit, m, f, buffer1, turn1, turn0, first, last, x_sn, w_st, s_st,
                 1, D, BITS, KEY, STEP, FEEDBACK),
            ),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip
    wait_for_previous()
