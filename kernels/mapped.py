"""Rows times a map on tensor cores, in bf16 parts.

Two parts (high + remainder, 17 bits) make a number: map = m_hi + m_lo, and x = x_hi + x_lo unless x is bf16 already;
x_lo m_lo is left out.  `mapped_here` is for maps without a remainder: those of the cache are bf16 numbers
(`rotation.in_one_part`), or +-c as a randomised Hadamard matrix, which is divided by c first.  Under the Triton
interpreter, whose bf16 product is wrong, the same parts are multiplied as float32 (OPERAND).
"""

import triton
import triton.language as tl

from .pack import arrange


@triton.jit
def two_parts(x, OPERAND: tl.constexpr):
    """float32 x as high part (truncated, so a bf16 x has no remainder) and remainder, both dot operands."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16).to(OPERAND), (x - high).to(tl.bfloat16).to(OPERAND)


@triton.jit
def map_parts(m, unit, inverse):
    """m / unit as high part with 8 significant bits (rounded, so +-unit has no remainder) and remainder, float32."""
    high = ((m * inverse).to(tl.int32, bitcast=True) + 32768 & -65536).to(tl.float32, bitcast=True)
    return high, (m - high * unit) * inverse


@triton.jit
def map_operands(m, unit, inverse, OPERAND: tl.constexpr):
    """`map_parts` as dot operands."""
    high, low = map_parts(m, unit, inverse)
    return high.to(tl.bfloat16).to(OPERAND), low.to(tl.bfloat16).to(OPERAND)


@triton.jit
def load_map(map, first, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Rows first .. first + ROWS - 1 of a map, float32 [ROWS, DP], zero beyond D."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    inside = (rows < D)[:, None] & (columns < D)[None, :]
    return tl.load(map + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def arranged(
    map, first, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, KEY: tl.constexpr, FEEDBACK: tl.constexpr
):
    """`load_map` with its columns in the order of the product's."""
    return arrange(load_map(map, first, D, DP, ROWS), KEY, FEEDBACK)


@triton.jit
def _any(more, other):
    """Whether any of `more`, any of `other` is not zero: both counts in one sum."""
    tl.static_assert(more.shape[0] * more.shape[1] < 32768)
    counts = tl.sum(tl.where(more != 0, 1, 0) + tl.where(other != 0, 65536, 0))
    return counts % 65536 > 0, counts >= 65536


@triton.jit
def survey(map, shift, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, IN_LOOP: tl.constexpr):
    """One look at a map, ROWS rows at a time.

    IN_LOOP: results are summed up in the loop, not after it.  Slower, but Triton 3.9 pipelines the loop over values of
    256 dims that comes after this only so.

    Returns:
        c if all entries are +-c, else 1; whether an entry / that has a second bf16 part; shift @ map, float32 [DP].
    """
    first = tl.load(map).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    more = tl.zeros([ROWS, DP], tl.int32)
    other = tl.zeros([ROWS, DP], tl.int32)
    any_more = False
    any_other = False
    products = tl.zeros([ROWS, DP], tl.float32)
    TOGETHER: tl.constexpr = max(1, min(DP // ROWS, 512 // DP))  # what registers hold
    for k in tl.range(0, DP, ROWS, num_stages=1, loop_unroll_factor=TOGETHER):
        m = load_map(map, k, D, DP, ROWS)
        bits = m.to(tl.int32, bitcast=True)
        if IN_LOOP:
            more_here, other_here = _any(bits & 0xFFFF, (bits & 0x7FFFFFFF) ^ first)
            any_more |= more_here
            any_other |= other_here
        else:
            more |= bits & 0xFFFF
            other |= (bits & 0x7FFFFFFF) ^ first
        row = k + tl.arange(0, ROWS)
        products += tl.load(shift + row, mask=row < D, other=0.0)[:, None] * m
    if not IN_LOOP:
        any_more, any_other = _any(more, other)
    alike = (D == DP) & (any_other == 0) & (first > 0)
    unit = tl.where(alike, first.to(tl.float32, bitcast=True), 1.0)
    return unit, any_more & (alike == 0), tl.sum(products, axis=0)


@triton.jit
def load_rows(rows, ok, first, D: tl.constexpr, K: tl.constexpr):
    """Dims first .. first + K - 1 of the vectors at pointers rows [N], zero where not ok (None: all are)."""
    dims = first + tl.arange(0, K)
    at = rows[:, None] + dims[None, :]
    if ok is not None:
        x = tl.load(at, mask=ok[:, None] & (dims < D)[None, :], other=0.0)
    elif D % K:
        x = tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def shift_operand(shifted, OPERAND: tl.constexpr):
    """Minus shifted float32 [DP] as three bf16 numbers below each other, the first rows of an operand [16, DP]."""
    high, _rest = two_parts(-shifted, tl.float32)
    middle, low = two_parts(-shifted - high, tl.float32)
    row = tl.arange(0, 16)[:, None]
    rows = tl.where(row == 0, high[None, :], tl.where(row == 1, middle[None, :], low[None, :]))
    return tl.where(row < 3, rows, 0.0).to(tl.bfloat16).to(OPERAND)


@triton.jit
def minus_shift(shift, ROWS: tl.constexpr, OPERAND: tl.constexpr):
    """Minus the mapped shift, float32 [ROWS, DP]: a product, as a vector would take up to 64 registers."""
    ones = tl.where(tl.arange(0, 16)[None, :] < 3 + tl.zeros([ROWS, 1], tl.int32), 1.0, 0.0)
    return tl.dot(ones.to(tl.bfloat16).to(OPERAND), shift, input_precision="ieee")


@triton.jit
def add_product(x, m, y, OPERAND: tl.constexpr):
    """y + x @ m, float32, for a dot operand m and x in any type."""
    if x.dtype == tl.bfloat16:
        y = tl.dot(x.to(OPERAND), m, y, input_precision="ieee")
    else:
        high, low = two_parts(x.to(tl.float32), OPERAND)
        y = tl.dot(low, m, y, input_precision="ieee")
        y = tl.dot(high, m, y, input_precision="ieee")
    return y


@triton.jit
def mapped_here(rows, minus, m, m2, D: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr):
    """`mapped`, all rows, by a map in one part that stays in shared memory, m its first 128 rows, m2 the others.

    minus: minus the mapped shift, float32 [DP], or as `shift_operand` makes it.
    """
    K: tl.constexpr = min(DP, 128)
    if len(minus.shape) == 1:
        y = tl.broadcast_to(minus[None, :], [rows.shape[0], DP])
    else:
        y = minus_shift(minus, rows.shape[0], OPERAND)
    y = add_product(load_rows(rows, None, 0, D, K), m, y, OPERAND)
    if DP > 128:
        y = add_product(load_rows(rows, None, 128, D, 128), m2, y, OPERAND)
    return y


@triton.jit
def mapped(
    rows, ok, map, shift,
    D: tl.constexpr, DP: tl.constexpr, KEY: tl.constexpr, FEEDBACK: tl.constexpr, KC: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """y [N, DP] = (rows - shift) @ map, zero where not ok, columns as `arrange`d; KC rows of the map at a time."""
    y = tl.zeros([rows.shape[0], DP], tl.float32)
    for first in tl.range(0, DP, KC, num_stages=1):
        x = load_rows(rows, ok, first, D, KC)
        offset = tl.load(shift + first + tl.arange(0, KC), mask=first + tl.arange(0, KC) < D, other=0.0)
        delta = tl.where(ok[:, None], x.to(tl.float32) - offset[None, :], 0.0)
        x_high, x_low = two_parts(delta, OPERAND)
        m_high, m_low = map_operands(arranged(map, first, D, DP, KC, KEY, FEEDBACK), 1.0, 1.0, OPERAND)
        y = tl.dot(x_low, m_high, y, input_precision="ieee")
        y = tl.dot(x_high, m_low, y, input_precision="ieee")
        y = tl.dot(x_high, m_high, y, input_precision="ieee")
    return y
