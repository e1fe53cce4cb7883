"""Quantise and pack in registers.

Rows and columns of the product that comes before are permuted (`token_order`, `arrange`) so that its accumulator holds
whole packed words: with four warps and 64 rows a warp owns half a tile, and no code changes its thread.  With error
feedback a thread holds even and odd dims as the halves of its registers, and the error of the even ones is already an
operand of tensor cores.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(0.75)  # of `reference`


@triton.jit
def token_of(row, KEY: tl.constexpr):
    """Token of a row of the first half of a block; that of the other half is 8 more.

    Rows are (tile i1 g) for keys, (tile b0 j0 t) for values: bits 0-2 are lanes of a warp, bit 3 is a register.
    """
    lane = row % 8
    near = row // 8 % 2
    if KEY:
        return row // 16 * 32 + near * 16 + lane
    return row // 16 * 32 + lane // 4 * 16 + lane % 4 * 2 + near


@triton.jit
def token_order(TILES: tl.constexpr, KEY: tl.constexpr):
    """Token of each row of the first half of a block, int32 [TILES * 16]."""
    return token_of(tl.arange(0, TILES * 16), KEY)


@triton.jit
def arrange(m, KEY: tl.constexpr, FEEDBACK: tl.constexpr):
    """The columns of a map in the order of the product's: values have their dims in order, (group m1 m0 g12 g0), keys
    (group jj byte1 t byte0).  With feedback the even dims come first: (g0 group m1 g12 m0), (byte0 group jj t byte1).

    Bits 1 and 2 of a column are lanes of a warp, the others are registers.
    """
    if FEEDBACK:
        if KEY:
            x = tl.permute(tl.reshape(m, [m.shape[0], m.shape[1] // 2, 2]), (0, 2, 1))
        else:
            x = tl.permute(tl.reshape(m, [m.shape[0], m.shape[1] // 16, 2, 4, 2]), (0, 4, 1, 3, 2))
        m = tl.reshape(x, m.shape)
    elif KEY:
        m = tl.permute(tl.reshape(m, [m.shape[0], m.shape[1] // 16, 4, 2, 2]), (0, 1, 3, 2, 4))
        m = tl.reshape(m, [m.shape[0], m.shape[1] * 16])
    return m


@triton.jit
def load_feedback(feedback, h, D: tl.constexpr, DP: tl.constexpr, KEY: tl.constexpr, OPERAND: tl.constexpr):
    """Feedback of head h as dot operand [DP / 2, DP / 2], rows and columns in the order of half a product's."""
    HALF: tl.constexpr = DP // 2
    row = tl.arange(0, HALF)
    column = tl.arange(0, HALF)
    if not KEY:
        row = row // 8 * 8 + row % 2 * 4 + row // 2 % 4
    inside = (row < D // 2)[:, None] & (column < D // 2)[None, :]
    f = tl.load(
        feedback + h * (D // 2) * (D // 2) + (row[:, None] * (D // 2) + column[None, :]), mask=inside, other=0.0
    )
    if not KEY:  # here, not in the addresses, which stay consecutive
        f = tl.reshape(tl.permute(tl.reshape(f, [HALF, HALF // 8, 2, 4]), (0, 1, 3, 2)), [HALF, HALF])
    return f.to(tl.bfloat16).to(OPERAND)


@triton.jit
def inverse_step(y, D: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
    """What `nearest` takes for steps of sigma * STEP, sigma that of the vectors y [N, DP]."""
    if BITS == 8:
        inverse = 127.0 / tl.maximum(tl.max(tl.abs(y), axis=1), 1e-30)
    else:
        inverse = tl.rsqrt(tl.maximum(tl.sum(y * y, axis=1), 1e-37)) * (D**0.5 / (STEP * ((1 << BITS) - 1)))
    return inverse


@triton.jit
def nearest(y, inverse, BITS: tl.constexpr, CLAMP: tl.constexpr, FUSED: tl.constexpr):
    """The floats y [N, C] is rounded in, whose lowest bits are the codes, and the levels c.

    inverse [N] is 1 / step, below 8 bits divided by the number of steps between the outermost levels.  CLAMP is for 8
    bits only: False where the largest entry gave the step.
    """
    if BITS == 8:
        share = y * inverse[:, None]
        if CLAMP:
            share = tl.minimum(tl.maximum(share, -127.0), 127.0)
        rounded = share + 12582912.0  # 1.5 * 2**23: rounds to nearest even
        c = rounded - 12582912.0
    else:
        # Level c is (code - TOP / 2), so code = round(clamp(y / step + TOP / 2, 0, TOP)).  Clamping to 0 .. 1 costs
        # nothing (a saturating multiply-add), and a tie at y = 0 rounds to the even number, code 2 ** (BITS - 1).
        MAGIC: tl.constexpr = 8388608.0 + (BITS == 1)
        TOP: tl.constexpr = (1 << BITS) - 1
        share = tl.minimum(tl.maximum(y * inverse[:, None] + 0.5, 0.0), 1.0)
        rounded = share * TOP + MAGIC
        if FUSED:  # one operation: 2**23 * (1 - 2**-24) is the half that no float near 2**23 has
            c = tl.fma(rounded, 1.0 - 2.0**-24, 0.5 - 0.5 * TOP - MAGIC)
        else:
            c = (rounded - MAGIC) - 0.5 * TOP
    return rounded, c


@triton.jit
def products(y, c, D: tl.constexpr, BITS: tl.constexpr):
    """<y, level> and <level, level>, whose quotient is the scale, over D dims; those beyond D are zeros."""
    if BITS == 8:
        product = 127.0 * tl.sum(y * c, axis=1)
        square = tl.maximum(tl.sum(c * c, axis=1), 1e-30)
    else:
        product = tl.sum(y * c, axis=1)
        square = tl.sum(c * c, axis=1) - 0.25 * (y.shape[1] - D)
    return product, square


@triton.jit
def join_halves(even, odd):
    """What belongs to even and odd dims, [N, DP / 2] each, in the order that `arrange` has without feedback."""
    x = tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] // 8, 4, 2, 2])
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), [even.shape[0], even.shape[1] * 2])


@triton.jit
def round_even(even, inverse, D: tl.constexpr, BITS: tl.constexpr, FUSED: tl.constexpr):
    """Round the even dims [N, DP / 2], inverse [N] as of `inverse_step`.

    Returns: the floats they are rounded in, the error that the odd dims make up for, float32 [N, DP / 2], the steps
    that odd dims are rounded in, and `products` [N].
    """
    rounded, c = nearest(even, inverse, BITS, False, FUSED)
    product, square = products(even, c, D // 2, BITS)
    STEPS: tl.constexpr = 1 if BITS == 8 else (1 << BITS) - 1
    least = tl.where(inverse < 1e15, LEAST / tl.maximum(inverse * STEPS, 1e-30), 0.0)  # zeros stay zeros
    step = tl.maximum(product / square / (127 if BITS == 8 else 1), least)
    return rounded, c * step[:, None] - even, step, product, square


@triton.jit
def round_odd(odd, step, D: tl.constexpr, BITS: tl.constexpr, FUSED: tl.constexpr):
    """Round the odd dims [N, DP / 2], which have made up for the error of the even ones, in steps [N].

    Returns: the floats they are rounded in, and `products` [N].
    """
    STEPS: tl.constexpr = 1 if BITS == 8 else (1 << BITS) - 1
    rounded, c = nearest(odd, 1.0 / (tl.maximum(step, 1e-30) * STEPS), BITS, True, FUSED)
    product, square = products(odd, c, D // 2, BITS)
    return rounded, product, square


@triton.jit
def codes_of(rounded, BITS: tl.constexpr):
    """Codes, int32, of the floats of `nearest`; below 8 bits with the exponent, which `put_words` takes off."""
    codes = rounded.to(tl.int32, bitcast=True)
    return codes & 255 if BITS == 8 else codes


@triton.jit
def quantize(y, feedback, D: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr):
    """y [N, DP] float32, zero beyond D, `arrange`d -> codes and scales.

    Codes are int32 [N, DP] in the order without feedback, as of `codes_of`; scales are float32 [N].  feedback is an
    operand of `load_feedback`, or None: with it the even dims are rounded first, and their error is multiplied from the
    registers that hold it.
    """
    FUSED: tl.constexpr = OPERAND == tl.bfloat16
    inverse = inverse_step(y, D, BITS, STEP)
    if feedback is None:
        rounded, c = nearest(y, inverse, BITS, False, FUSED)
        product, square = products(y, c, D, BITS)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(y, [y.shape[0], 2, y.shape[1] // 2]), (0, 2, 1)))
        rounded0, error, step, product, square = round_even(even, inverse, D, BITS, FUSED)
        if not FUSED:  # the interpreter's conversion truncates
            error = (error.to(tl.int32, bitcast=True) + 32768 & -65536).to(tl.float32, bitcast=True)
        if D <= 128:  # a product of its own: into a part of the accumulator ptxas runs them one by one
            odd = odd - tl.dot(error.to(tl.bfloat16).to(OPERAND), feedback, input_precision="ieee")
        else:  # what registers hold
            odd = tl.dot((-error).to(tl.bfloat16).to(OPERAND), feedback, odd, input_precision="ieee")
        rounded1, product1, square1 = round_odd(odd, step, D, BITS, FUSED)
        rounded = join_halves(rounded0, rounded1)
        product += product1
        square += square1
    return codes_of(rounded, BITS), product / square


@triton.jit
def _fold(x, SHIFT: tl.constexpr):
    """Pairs in the last dimension -> first + second * 2 ** SHIFT."""
    low, high = tl.split(x)
    return low + high * (1 << SHIFT)


@triton.jit
def get_words(codes, BITS: tl.constexpr, KEY: tl.constexpr):
    """Codes [TILES * 16, DP] of half a block -> what they add to words of layout v2, int32 [2 * TILES, DP].

    Rows are (jj tile) for keys, (g0 tile) for values; columns are (lane group), lanes being (g t) for keys, (j0 t g12)
    for values: the order in which threads hold them.  At 8 bits rows begin with i1 for keys and (m1 m0) for values.
    """
    TILES: tl.constexpr = codes.shape[0] // 16
    R: tl.constexpr = codes.shape[1] // 32
    if KEY:
        x = tl.reshape(codes, [TILES, 2, 8, R, 2, 2, 4, 2])  # tile i1 g group jj byte1 t byte0
        if BITS == 8:
            x = _fold(_fold(tl.permute(x, (1, 4, 0, 2, 6, 3, 5, 7)), 8), 16)
            x = tl.reshape(x, [4 * TILES, 32 * R])
        else:
            x = _fold(_fold(_fold(tl.permute(x, (4, 0, 2, 6, 3, 5, 7, 1)), 4), 8), 16)
            x = tl.reshape(x, [2 * TILES, 32 * R])
    else:
        x = tl.reshape(codes, [TILES, 2, 2, 4, R, 2, 2, 4, 2])  # tile b0 j0 t group m1 m0 g12 g0
        if BITS == 8:
            x = tl.reshape(_fold(tl.permute(x, (5, 6, 8, 0, 2, 3, 7, 4, 1)), 8), [8 * TILES, 32 * R])
        elif BITS >= 3:
            x = _fold(_fold(_fold(tl.permute(x, (8, 0, 2, 3, 7, 4, 1, 6, 5)), 4), 8), 16)
            x = tl.reshape(x, [2 * TILES, 32 * R])
        else:
            x = _fold(_fold(_fold(tl.permute(x, (8, 0, 2, 3, 7, 4, 6, 1, 5)), 4), 16), BITS)
            x = tl.reshape(x, [2 * TILES, 32 * R])
    return x


@triton.jit
def _sum_major(x, KEY: tl.constexpr):
    """Sum over the major digit of the words, jj or j0, at both places where it was."""
    if KEY:
        halves = tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]])
        total = tl.broadcast_to(tl.sum(halves, axis=0, keep_dims=True), halves.shape)
    else:
        halves = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
        total = tl.broadcast_to(tl.sum(halves, axis=1, keep_dims=True), halves.shape)
    return tl.reshape(total, x.shape)


@triton.jit
def put_words(
    x0, x1, row, column, words, tile_stride, left,
    D: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """Store the words of a block from its halves (i0 or b1 = 0, 1): tile i < left at words + i * tile_stride.

    row and column: indices of the words, [rows, 1] and [1, columns].
    """
    G: tl.constexpr = D // 32
    R: tl.constexpr = x0.shape[1] // 32
    PLANE: tl.constexpr = 32 * G
    tile = row % TILES
    group = column % R
    if KEY:
        lane = column // R
        major = row // TILES % 2  # jj
    else:
        lane = column // R % 4 * 8 + row // TILES % 2 * 4 + column // (4 * R) % 4
        major = column // (16 * R)  # j0
    at = words + tile.to(tl.int64) * tile_stride + (lane * G + group)
    ok = (tile < left) & (group < G)
    # What the constant of every code adds to a word.
    SHARES: tl.constexpr = 0x11111111 if BITS >= 3 else (0x55555555 if BITS == 2 else 0xFFFFFFFF)
    SUM: tl.constexpr = (SHARES * (0x4B000000 + (BITS == 1))) & 0xFFFFFFFF
    OFFSET: tl.constexpr = SUM - ((SUM >> 31) << 32)
    FLIP: tl.constexpr = -2139062144 if KEY and BITS > 1 else 0  # 0x80808080
    if BITS == 8:
        if KEY:  # planes i1 i0 jj
            at += (row // (2 * TILES) * 4 + major) * PLANE
            tl.store(at, x0, mask=ok)
            tl.store(at + 2 * PLANE, x1, mask=ok)
        else:  # planes m1 m0 j0
            at += (row // (2 * TILES) * 2 + major) * PLANE
            tl.store(at, x0 + x1 * 65536, mask=ok)
    elif BITS >= 3:
        x0 -= OFFSET
        x1 -= OFFSET
        plane = major * 2
        if BITS == 3:
            ONES: tl.constexpr = 0x11111111
            spare = _sum_major(tl.where(major == 1, x1, 0), KEY)
            x0 = (x0 << 1) | ((spare >> (2 - plane)) & ONES)
            x1 = (x1 << 1) | ((spare >> 1) & ONES)
            if KEY:
                x0 ^= tl.where(major == 0, 0x10101010, 0)
        tl.store(at + plane * PLANE, x0 ^ FLIP, mask=ok)
        tl.store(at + (plane + 1) * PLANE, x1 ^ FLIP, mask=ok & (plane < 2) if BITS == 3 else ok)
    else:
        x = x0 + (x1 << BITS if KEY else x1 << 8)
        if BITS == 2:
            tl.store(at + major * PLANE, (x - OFFSET) ^ FLIP, mask=ok)
        else:
            x = _sum_major(x << (2 * major), KEY)
            tl.store(at, x - OFFSET, mask=ok & (major == 0))


@triton.jit
def put_scales(scale, unit, scales, scale_stride, token, left):
    """Store scales float32 [N], times `unit`, of tokens [N] of a block of which `left` tiles exist."""
    scale = tl.abs(scale * unit)  # negative only where the squares of y overflow
    scale = tl.where(scale < float("inf"), tl.minimum(scale, 65504.0), float("nan"))
    at = scales + (token // 32 * scale_stride + token % 32)
    tl.store(at, scale.to(tl.float16), mask=token // 32 < left)
