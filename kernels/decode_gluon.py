"""Splits of a decode step over packed K and V on the tensor cores, codes as MMA operands (Gluon, sm_80 and newer).

Per step of TILES tiles (32 tokens each) of one KV head, for up to 8 HT query heads:

    S   = [q_hi; q_lo] K^T         int8 x int8 -> int32 (m16n8k32), s = (128 S_hi + S_lo) * |k| * step
    m'  = max(m, max s)            p = 2 ** (s - m')
    O^T = O^T * 2 ** (m - m') + V^T (p |v|)^T        fp16 x fp16 -> float32 (m16n8k16)

K and V are bit fields of the packed words (fragments.py): levels times a power of two, counted from zero instead of
from the middle level.  Scores start at what that adds; the output has (middle level) * sum(p |v|) taken off at the end,
the sum from the same products (a row of ones in place of V).

Grid: (splits, batch * KV heads, tiles of 8 HT query heads).  Split i attends to tiles `_first_step(i)` and on, split
i < chunks to chunk i of the exact tokens as well.  The last steps of a long row, `to_claim` to a split, are not dealt
out so but go one by one to splits that are ready (`_claim`): memory serves some programs faster than others.  Block:
one warp with its own online softmax, a ring of two steps filled by cp.async.  Rows of different length split what they
have: the grid only knows the capacity.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .exact_gluon import attend_exact, store_part
from .fragments import (
    SUBNORMAL,
    inverse_units,
    key_operand,
    middle,
    starts,
    unpack_key,
    unpack_value,
    value_operand,
)  # fmt: skip
from .gluon_basics import async_load, barrier, halves, launch_next, softcapped, wait_for_previous

# p is kept 2 ** 4 larger: small p |v| stay normal in fp16, which holds value scales up to 4094.
RESCALE = gl.constexpr(4.0)


@gluon.jit
def _load_planes(ring, slot, at: gl.constexpr, BITS: gl.constexpr, CHUNKS: gl.constexpr, RAW: gl.constexpr):
    """Planes at, at + CHUNKS, ... of a ring slot."""
    planes = ()
    for w in gl.static_range(BITS):
        planes = planes + (ring[at + w * CHUNKS].index(slot).load(RAW),)
    return planes


@gluon.jit
def _fetch(
    ring, scales, p_k, p_v, p_ks, p_vs, tile, last, slot, copy_at, scale_at,
    D: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr, TILES: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Start copying TILES tiles from `tile` (not beyond `last`) to ring slot `slot`."""
    PLANES: gl.constexpr = (K_BITS + V_BITS) * CHUNKS
    at = gl.minimum(tile + scale_at // 32, last).to(gl.int64) * 32 + scale_at % 32
    async_load(scales[0].index(slot), p_ks + at)
    async_load(scales[1].index(slot), p_vs + at)
    for j in gl.static_range(TILES):
        t = gl.minimum(tile + j, last).to(gl.int64)
        for c in gl.static_range(CHUNKS):
            for w in gl.static_range(K_BITS):
                to = ring[j * PLANES + w * CHUNKS + c].index(slot)
                async_load(to, p_k + t * (4 * D * K_BITS) + (w * 4 * D + c * 4) + copy_at)
            for w in gl.static_range(V_BITS):
                to = ring[j * PLANES + (K_BITS + w) * CHUNKS + c].index(slot)
                async_load(to, p_v + t * (4 * D * V_BITS) + (w * 4 * D + c * 4) + copy_at)


@gluon.constexpr_function
def _lines(size):
    """Cache lines of `size` bytes, rounded up to a power of two of at least 32."""
    return max(32, 1 << (-(-size // 128) - 1).bit_length())


@gluon.jit
def _send_for(p, tile, tiles, BYTES: gl.constexpr, TILES: gl.constexpr):
    """Start TILES tiles of BYTES bytes from `tile` (of `tiles`) on their way to L2."""
    at = gl.arange(0, _lines(BYTES * TILES), gl.BlockedLayout([1], [32], [1], [0])) * 128
    wanted = at < gl.minimum(tiles - tile, TILES) * BYTES
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
        [p + tile.to(gl.int64) * BYTES + at, wanted.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _step(
    q, q_start, step_size, bias, key_unit, m, l, mass, acc, ring, scales, p_k, p_v, p_ks, p_vs,
    step, following, steps, slot, last, packed, cap, copy_at, scale_at, token,
    D: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr, HT: gl.constexpr, TILES: gl.constexpr,
    CHUNKS: gl.constexpr, SOFTCAP: gl.constexpr, MASKED: gl.constexpr,
    K_ASM: gl.constexpr, K_CONSTRAINTS: gl.constexpr, V_ASM: gl.constexpr, V_CONSTRAINTS: gl.constexpr,
    S_L: gl.constexpr, RAW: gl.constexpr,
):  # fmt: skip
    """Send for the following step, then one online-softmax step over the TILES tiles of `step`, which are in ring slot
    `slot`; tuples hold one entry per head tile (and chunk)."""
    KB: gl.constexpr = gl.DotOperandLayout(1, S_L, 4)
    VA: gl.constexpr = gl.DotOperandLayout(0, S_L, 2)
    PB: gl.constexpr = gl.DotOperandLayout(1, S_L, 2)
    PLANES: gl.constexpr = (K_BITS + V_BITS) * CHUNKS
    BLOCKS: gl.constexpr = D // 32
    async_copy.wait_group(0)
    barrier()
    if not MASKED:  # which only the last step of all is
        if following < steps:
            _fetch(
                ring, scales, p_k, p_v, p_ks, p_vs, following * TILES, last, 1 - slot, copy_at, scale_at,
                D, K_BITS, V_BITS, TILES, CHUNKS,
            )  # fmt: skip
        async_copy.commit_group()
    left = packed - step * (32 * TILES)

    s = ()
    for j in gl.static_range(TILES):
        raw = q_start
        for c in gl.static_range(CHUNKS):
            planes = _load_planes(ring, slot, j * PLANES + c, K_BITS, CHUNKS, RAW)
            kT = key_operand(unpack_key(planes, K_ASM, K_CONSTRAINTS, K_BITS), BLOCKS // CHUNKS)
            kT = gl.convert_layout(kT, KB, assert_trivial=True)
            total = ()
            for x in gl.static_range(HT):
                total = total + (mma_v2(q[x * CHUNKS + c], kT, raw[x]),)
            raw = total
        norm = scales[0].index(slot).slice(32 * j, 32).load(token.type.layout).to(gl.float32) * key_unit
        for x in gl.static_range(HT):
            hi, lo = halves(raw[x])
            score = (hi * 128 + lo).to(gl.float32) * norm[None, :]
            if SOFTCAP:
                score = softcapped(score * step_size[x][:, None] + bias[x][:, None], cap)
            if MASKED:
                score = gl.where((token + 32 * j < left)[None, :], score, float("-inf"))
            s = s + (score,)

    m_new = ()
    l_new = ()
    mass_new = ()
    scaled = ()
    for x in gl.static_range(HT):
        top = s[x]
        for j in gl.static_range(1, TILES):
            top = gl.maximum(top, s[j * HT + x])
        top = gl.max(top, axis=1)
        if not SOFTCAP:
            top = top * step_size[x]
        top = gl.maximum(m[x], top)
        alpha = gl.exp2(m[x] - top)
        m_new = m_new + (top,)
        l_new = l_new + (l[x] * alpha,)
        column_alpha = gl.convert_layout(alpha, gl.SliceLayout(0, S_L))
        for c in gl.static_range(CHUNKS):
            scaled = scaled + (acc[x * CHUNKS + c] * column_alpha[None, :],)
        mass_new = mass_new + (mass[x] * column_alpha[None, :],)
    acc = scaled
    mass = mass_new
    ones = gl.full([16, 32], 1.0, gl.float16, VA)

    for j in gl.static_range(TILES):
        norm = scales[1].index(slot).slice(32 * j, 32).load(token.type.layout).to(gl.float32)
        if MASKED:
            norm = gl.where(token + 32 * j < left, norm, 0.0)
        pT = ()
        total = ()
        for x in gl.static_range(HT):
            shift = RESCALE - m_new[x]
            if SOFTCAP:
                p = gl.exp2(s[j * HT + x] + shift[:, None])
            else:
                p = gl.exp2(s[j * HT + x] * step_size[x][:, None] + shift[:, None])
            total = total + (l_new[x] + gl.sum(p, axis=1),)
            weighted = gl.permute((p * norm[None, :]).to(gl.float16), (1, 0))
            pT = pT + (gl.convert_layout(weighted, PB, assert_trivial=True),)
        l_new = total
        if V_BITS < 8:
            mass_new = ()
            for x in gl.static_range(HT):
                mass_new = mass_new + (mma_v2(ones, pT[x], mass[x]),)
            mass = mass_new
        fresh = ()
        vT = ()
        for c in gl.static_range(CHUNKS):
            planes = _load_planes(ring, slot, j * PLANES + K_BITS * CHUNKS + c, V_BITS, CHUNKS, RAW)
            r = unpack_value(planes, V_ASM, V_CONSTRAINTS, V_BITS)
            vT = vT + (gl.convert_layout(value_operand(r, BLOCKS // CHUNKS), VA, assert_trivial=True),)
        for x in gl.static_range(HT):
            for c in gl.static_range(CHUNKS):
                fresh = fresh + (mma_v2(vT[c], pT[x], acc[x * CHUNKS + c]),)
        acc = fresh
    return m_new, l_new, mass, acc


@gluon.jit
def _load_query(
    rotated, bias, row, first_head, half, D: gl.constexpr, G: gl.constexpr, QD: gl.constexpr, K_BITS: gl.constexpr,
    S_L: gl.constexpr,
):  # fmt: skip
    """Eight query heads as 15-bit integers in two int8 rows: y = step * (128 hi + lo).

    The integer tensor cores read both for the price of one, hi in rows 0-7 and lo in rows 8-15 of an m16 operand.
    Returns the operand of each QD dimensions, what scores start at [16, 32], step and bias [8].
    """
    QA: gl.constexpr = gl.DotOperandLayout(0, S_L, 4)
    like = gl.permute(gl.reshape(gl.zeros([16, QD], gl.int8, QA), [2, 8, QD]), (1, 2, 0))
    low, _ = gl.split(like)
    L: gl.constexpr = low.type.layout
    head = gl.minimum(first_head + gl.arange(0, 8, gl.SliceLayout(1, L)), G - 1)
    column = gl.arange(0, QD, gl.SliceLayout(0, L))
    y = ()
    for c in gl.static_range(D // QD):
        y = y + (gl.load(rotated + (row + head)[:, None] * D + (c * QD + column)[None, :]),)
    top = gl.max(gl.abs(y[0]), axis=1)
    for c in gl.static_range(1, D // QD):
        top = gl.maximum(top, gl.max(gl.abs(y[c]), axis=1))
    top = gl.maximum(top, 1e-30)  # a query of zeros: masked scores are -inf times its step
    inverse = 127.0 / top
    total = gl.zeros([8], gl.float32, gl.SliceLayout(1, L))
    q = ()
    for c in gl.static_range(D // QD):
        scaled = y[c] * inverse[:, None]
        # Adding 1.5 * 2**23 rounds to the nearest integer and leaves it in the low bits.
        hi = scaled + 12582912.0
        rest = scaled - (hi - 12582912.0)
        lo = rest * 128.0 + 12582912.0
        total += gl.sum((hi - 12582912.0) * 128.0 + (lo - 12582912.0), axis=1)
        pair = gl.join(hi.to(gl.int32, bitcast=True).to(gl.int8), lo.to(gl.int32, bitcast=True).to(gl.int8))
        pair = gl.reshape(gl.permute(pair, (2, 0, 1)), [16, QD])
        q = q + (gl.convert_layout(pair, QA, assert_trivial=True),)
    # Row 8 + g starts at what the fields count too much, row g at zero: s = 128 hi + lo.
    tile = gl.arange(0, 32, gl.SliceLayout(0, S_L)) // 8
    zero = gl.zeros([8], gl.float32, gl.SliceLayout(1, L))
    two = gl.reshape(gl.permute(gl.join(zero, total), (1, 0)), [16])
    sums = gl.convert_layout(two, gl.SliceLayout(1, S_L)).to(gl.int32)
    twice = starts(tile, K_BITS)
    start = sums[:, None] * twice[None, :] >> 1
    head = gl.minimum(first_head + half, G - 1)
    step = gl.convert_layout(top, half.type.layout) * (1.0 / (127.0 * 128.0))
    return q, start, step, gl.load(bias + row + head)


@gluon.jit
def _first_step(split, splits, steps, chunks, exact_quarters):
    """Where a split begins: the first `chunks` of them attend to exact tokens, worth exact_quarters / 4 steps each.

    In integers, so that the end of a split is the beginning of the next; monotonic because `less` is no more than what
    a split has, and `steps` at split == splits.
    """
    less = gl.minimum(exact_quarters, 4 * steps // gl.maximum(splits - chunks, 1))
    return (split * (4 * steps + less * chunks) // splits - less * gl.minimum(split, chunks)) // 4


@gluon.jit
def _dealt_out(steps, splits, to_claim):
    """How many of a row's steps belong to splits in turn: all but `to_claim` to a split, unless that is over half."""
    return gl.where(steps >= 2 * to_claim * splits, steps - to_claim * splits, steps)


@gluon.jit
def _after(step, end, steps):
    """What a split does after `step` without a claim: its next step before `end`, else nothing, which is `steps`."""
    return gl.where(step + 1 < end, step + 1, steps)


@gluon.jit
def _claim(claims, count):
    """Ask for `count` steps that are not anyone's yet; `_claimed` waits for the answer."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; setp.ne.and.u32 p, $2, 0, p; "
        "mov.b32 $0, 0; @p atom.relaxed.gpu.global.add.u32 $0, [$1], $2; }",
        "=&r,l,r", [claims, count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _claimed(claim):
    """The first of the steps that were asked for: what the first lane got."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [claim], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit(do_not_specialize=["group", "q_len", "splits", "chunks", "exact_quarters", "to_claim"])
def gluon_splits_kernel(
    rotated, bias, claims, k_codes, k_scales, v_codes, v_scales, q_exact, k_sinks, v_sinks, k_recent, v_recent, length,
    start, split_o, split_ml, exact_o, exact_ml,
    stride_kb, stride_kh, stride_ksb, stride_ksh, stride_vb, stride_vh, stride_vsb, stride_vsh,
    stride_qb, stride_qh, stride_qn, stride_sb, stride_sh, stride_rb, stride_rh,
    heads, group, q_len, sinks, window, capacity, splits, chunks, chunk_tokens, exact_quarters, to_claim, factor, cap,
    G: gl.constexpr, D: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr, HT: gl.constexpr,
    TILES: gl.constexpr, SOFTCAP: gl.constexpr, FEW: gl.constexpr, PDL: gl.constexpr,
    K_ASM: gl.constexpr, K_CONSTRAINTS: gl.constexpr, V_ASM: gl.constexpr, V_CONSTRAINTS: gl.constexpr,
    num_warps: gl.constexpr = 1,
):  # fmt: skip
    """Un-normalised output, maximum (log2, bias included) and sum of each split of the packed tokens.

    rotated, bias and claims as `query.prepare_kernel` writes them; codes as int8 [B, H, T, tile bytes]; scales fp16
    [B, H, T, 32]; sinks and recent tokens in a 16-bit dtype if chunks > 0, else the exact part is done elsewhere;
    outputs as `combine_gluon.combine_gluon_kernel` reads them.  to_claim: steps to a split of a long row that are
    claimed; 0: all are dealt out, so that what a split adds up, and its rounding, is the same in each run.  FEW:
    rows of a KV head are queries as in `query.prepare_few_kernel`, which fills the exact part behind the chunks.
    """
    gl.static_assert(num_warps == 1, "a claim is one warp's")
    GROUPS: gl.constexpr = D // 32
    CHUNKS: gl.constexpr = 1 if (GROUPS & (GROUPS - 1)) == 0 else GROUPS
    CHUNK_GROUPS: gl.constexpr = GROUPS // CHUNKS
    CHUNK_BYTES: gl.constexpr = 4 * D // CHUNKS
    LANE_BYTES: gl.constexpr = CHUNK_BYTES // 32
    QD: gl.constexpr = D // CHUNKS
    PLANES: gl.constexpr = (K_BITS + V_BITS) * CHUNKS
    EXACT_TOKENS: gl.constexpr = 32 if D <= 128 else 16  # what shared memory holds

    S_L: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    RAW: gl.constexpr = gl.BlockedLayout([LANE_BYTES], [32], [1], [0])
    COPY: gl.constexpr = gl.BlockedLayout([LANE_BYTES if LANE_BYTES < 16 else 16], [32], [1], [0])
    COPY_SCALE: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    if PDL:
        launch_next()
    split = gl.program_id(0)
    bh = gl.program_id(1)
    head_tile = gl.program_id(2) * HT
    b = (bh // heads).to(gl.int64)
    h = (bh % heads).to(gl.int64)

    n = gl.maximum(gl.load(length) - gl.load(start + b), 0).to(gl.int32)
    packed = gl.where(capacity == 0, gl.maximum(n - sinks, 0), gl.maximum(n - sinks - window, 0) // 32 * 32)
    tiles = (packed + 31) // 32
    steps = (tiles + TILES - 1) // TILES
    dealt = _dealt_out(steps, splits, to_claim)
    first = _first_step(split, splits, dealt, chunks, exact_quarters)
    end = _first_step(split + 1, splits, dealt, chunks, exact_quarters)
    claims += bh * gl.num_programs(2) + gl.program_id(2)

    hi0, _ = halves(gl.zeros([16, 32], gl.int32, S_L))
    SL: gl.constexpr = hi0.type.layout
    HEAD: gl.constexpr = gl.SliceLayout(1, SL)
    TOKEN: gl.constexpr = gl.SliceLayout(0, SL)
    head = gl.arange(0, 8, HEAD)
    token = gl.arange(0, 32, TOKEN)

    p_k = k_codes + b * stride_kb + h * stride_kh
    p_v = v_codes + b * stride_vb + h * stride_vh
    p_ks = k_scales + b * stride_ksb + h * stride_ksh
    p_vs = v_scales + b * stride_vsb + h * stride_vsh
    # This program's share of the exact tokens, before the ring takes over its shared memory.
    if split < chunks:
        if end - first <= 4:  # a share so small that its first step is much of it
            _send_for(p_k, first * TILES, tiles, 4 * D * K_BITS, TILES)
            _send_for(p_v, first * TILES, tiles, 4 * D * V_BITS, TILES)
        n_sinks = gl.minimum(n, sinks)
        n_exact = n_sinks + gl.where(capacity == 0, 0, gl.maximum(n - sinks, 0) - packed)
        at_q = q_exact + b * stride_qb + h * (group if FEW else G) * stride_qh
        at_s = b * stride_sb + h * stride_sh
        at_r = b * stride_rb + h * stride_rh
        at_part = (bh * (chunks + 1 if FEW else chunks) + split).to(gl.int64) * G
        for x in gl.static_range(HT):
            m_exact, l_exact, acc_exact = attend_exact(
                at_q, k_sinks, v_sinks, k_recent, v_recent, stride_qh, stride_qn, at_s, at_r, (head_tile + x) * 8,
                split, n_sinks, n_exact, packed, capacity, chunk_tokens, group, q_len, factor, cap, G, D, QD,
                EXACT_TOKENS, SOFTCAP, FEW, S_L,
            )  # fmt: skip
            store_part(
                exact_o, exact_ml, m_exact, l_exact, acc_exact, at_part, (head_tile + x) * 8, G, D, QD, True, S_L
            )
    # One allocation per plane: Triton 3.6 puts a barrier between any two copies into the same allocation.
    ring = ()
    for _ in gl.static_range(TILES * PLANES):
        ring = ring + (gl.allocate_shared_memory(gl.int8, [2, CHUNK_BYTES], FLAT),)
    scales = ()
    for _ in gl.static_range(2):
        scales = scales + (gl.allocate_shared_memory(gl.float16, [2, 32 * TILES], FLAT),)
    copy_at = gl.arange(0, CHUNK_BYTES, COPY)
    if CHUNKS > 1:
        copy_at = copy_at // 4 * (D // 8) + copy_at % 4
    scale_at = gl.arange(0, 32 * TILES, COPY_SCALE)
    last = gl.maximum(tiles - 1, 0)

    if first < end:
        _fetch(
            ring, scales, p_k, p_v, p_ks, p_vs, first * TILES, last, 0, copy_at, scale_at,
            D, K_BITS, V_BITS, TILES, CHUNKS,
        )  # fmt: skip

    if PDL:  # the queries must be ready from here on, and `claims` zero
        wait_for_previous()
    step = _after(first - 1, end, steps)
    following = _after(first, end, steps)
    if (following == steps) & (dealt < steps):
        wanted = gl.where(first < end, 1, 2)
        claimed = dealt + _claimed(_claim(claims, wanted))
        following = claimed + wanted - 1
        if wanted == 2:
            step = claimed
            if step < steps:
                _fetch(
                    ring, scales, p_k, p_v, p_ks, p_vs, step * TILES, last, 0, copy_at, scale_at,
                    D, K_BITS, V_BITS, TILES, CHUNKS,
                )  # fmt: skip
    async_copy.commit_group()
    q = ()
    q_start = ()
    step_size = ()
    offset = ()
    m = ()
    l = ()
    mass = ()
    acc = ()
    for x in gl.static_range(HT):
        q_x, start_x, step_x, bias_x = _load_query(
            rotated, bias, bh.to(gl.int64) * G, (head_tile + x) * 8, head, D, G, QD, K_BITS, S_L
        )
        q += q_x
        q_start += (start_x,)
        step_size += (step_x,)
        offset += (bias_x,)
        m += (gl.full([8], -1e30, gl.float32, HEAD),)
        l += (gl.full([8], 0.0, gl.float32, HEAD),)
        mass += (gl.zeros([16, 8], gl.float32, S_L),)
        for _ in gl.static_range(CHUNKS):
            acc += (gl.zeros([32 * CHUNK_GROUPS, 8], gl.float32, S_L),)
    key_unit = inverse_units(token // 8, K_BITS)
    full = packed // (32 * TILES)
    slot = 0
    while step < full:
        then = _after(following, end, steps)
        asking = (then == steps) & (following < steps) & (dealt < steps)
        claim = _claim(claims, asking.to(gl.int32))
        m, l, mass, acc = _step(
            q, q_start, step_size, offset, key_unit, m, l, mass, acc, ring, scales, p_k, p_v, p_ks, p_vs,
            step, following, steps, slot, last, packed, cap, copy_at, scale_at, token,
            D, K_BITS, V_BITS, HT, TILES, CHUNKS, SOFTCAP, False,
            K_ASM, K_CONSTRAINTS, V_ASM, V_CONSTRAINTS, S_L, RAW,
        )  # fmt: skip
        step = following
        following = gl.where(asking, dealt + _claimed(claim), then)
        slot = 1 - slot
    for last_step in range(step, steps):  # one at most
        m, l, mass, acc = _step(
            q, q_start, step_size, offset, key_unit, m, l, mass, acc, ring, scales, p_k, p_v, p_ks, p_vs,
            last_step, steps, steps, slot, last, packed, cap, copy_at, scale_at, token,
            D, K_BITS, V_BITS, HT, TILES, CHUNKS, SOFTCAP, True,
            K_ASM, K_CONSTRAINTS, V_ASM, V_CONSTRAINTS, S_L, RAW,
        )  # fmt: skip

    at_split = (bh * splits + split).to(gl.int64) * G
    block = gl.arange(0, QD, gl.SliceLayout(1, S_L)) // 8 % 4
    unit = inverse_units(block, V_BITS) * (1.0 if V_BITS == 8 else SUBNORMAL)
    for x in gl.static_range(HT):
        m_out = m[x] - RESCALE
        if not SOFTCAP:
            m_out = m_out + offset[x]
        below = gl.max(mass[x], axis=0) * middle(V_BITS)
        mine = ()
        for c in gl.static_range(CHUNKS):
            o = acc[x * CHUNKS + c] * unit[:, None] - below[None, :]
            mine = mine + (o * (1.0 / 127.0) if V_BITS == 8 else o,)
        store_part(split_o, split_ml, m_out, l[x], mine, at_split, (head_tile + x) * 8, G, D, QD, False, S_L)
