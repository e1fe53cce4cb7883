"""Extend attention against the float64 reference on the same cache: interpreter without a GPU, on it with one."""

import re

import layer_state
import pytest
import torch

from tq_ao import reference
from tq_ao.codebook import BITS, codebook

decode = pytest.importorskip("tq_ao.kernels.decode_attention")
extend = pytest.importorskip("tq_ao.kernels.extend_attention")  # triton exists on Linux only
levels = pytest.importorskip("tq_ao.kernels.levels")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # the interpreter's: log of 0, 1 / 0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOW = 32
# Relative error allowed.  fp16: rounding of queries, probabilities and output; float32: maps are inverse to 1e-6 only.
LIMIT = {torch.float32: 5e-5, torch.float16: 8e-4, torch.bfloat16: 4e-3}


def problem(
    rng: torch.Generator, dim: int = 64, k_bits: int = 3, v_bits: int = 4, heads: int = 1, group: int = 2,
    seen: int = 200, pad: int = 11, q_len: int = 5, sinks: int = 4, softcap: float = 0.0, logits: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple, tuple]:  # fmt: skip
    """Arguments of `extend_attention` and the code widths; unused scales stay NaN."""
    maps = layer_state.maps(heads, dim, rng).to(DEVICE)
    start = torch.tensor([0, pad], device=DEVICE)
    state = layer_state.empty_cache(2, heads, dim, max(32, seen), k_bits, v_bits, sinks, WINDOW, None, dtype, DEVICE)

    def new(h: int, n: int) -> torch.Tensor:
        return layer_state.tokens(2, h, n, dim, rng, dtype).to(DEVICE)

    if seen:
        reference.append_(
            *state, new(heads, seen), new(heads, seen), torch.tensor(0), start,
            maps.key, maps.key_shift, maps.value, maps.value_shift, WINDOW,
        )  # fmt: skip
    sink_logits = torch.randn(heads * group, generator=rng).to(DEVICE) if logits else None
    args = (
        new(heads * group, q_len), new(heads, q_len), new(heads, q_len), *state, torch.tensor(seen, device=DEVICE),
        start, maps.query, maps.key_shift, maps.output, maps.value_shift, WINDOW, dim**-0.5, softcap, sink_logits,
    )  # fmt: skip
    return args, (k_bits, v_bits)


def poison_padding(args: tuple) -> None:
    """Make padding among the new tokens NaN, as masked rows of earlier layers may be: it is nobody's key or query."""
    rest = args[3:]
    for b, first in enumerate(rest[9].tolist()):
        for new in args[:3]:
            new[b, :, : max(0, first - int(rest[8]))] = torch.nan


def check(args: tuple, bits: tuple, impl: str = "triton") -> None:
    q, k_new, v_new, *rest = args
    want = reference.attention(q.double(), *rest, k_new, v_new, torch.float64)
    got = extend.extend_attention(*args, *bits, impl)
    assert got.shape == q.shape
    assert got.dtype == q.dtype
    assert got.is_contiguous()
    assert got.isfinite().all()
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < LIMIT[q.dtype], f"relative error {error:.1e}"
    length, start = rest[8], rest[9]
    for b, first in enumerate(start.tolist()):
        assert not got[b, :, : max(0, first - int(length))].any(), "queries of padding tokens must give zeros"


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(1, 8), (2, 3), (3, 1), (4, 2), (8, 4)])
def test_equals_the_reference(k_bits: int, v_bits: int, dim: int, rng: torch.Generator) -> None:
    check(*problem(rng, dim, k_bits, v_bits))


SHAPES = {
    "head_dim 256": {"dim": 256, "seen": 120, "q_len": 2},
    "many rows": {"q_len": 70, "seen": 120},
    "group of 7, cap and logits": {"group": 7, "softcap": 20.0, "logits": True},
    "empty cache": {"seen": 0, "pad": 2},
    "nothing packed": {"seen": 30},
    "all of a row is padding": {"seen": 20, "pad": 40, "q_len": 9},
    "padding inside the new tokens": {"seen": 20, "pad": 24},
    "no sinks": {"sinks": 0, "heads": 2, "group": 1},
    "a single query": {"q_len": 1},
    "fp16": {"dtype": torch.float16, "dim": 128},
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str, rng: torch.Generator) -> None:
    args, bits = problem(rng, **SHAPES[case])
    poison_padding(args)
    check(args, bits)


def test_everything_packed_without_a_ring(rng: torch.Generator) -> None:
    args, bits = problem(rng, seen=45, pad=0, sinks=0)
    state, maps = list(args[3:11]), args[13:17]
    x = layer_state.tokens(2, 1, 45, 64, rng).to(DEVICE)
    inverse = [torch.linalg.inv(m.double()).float() for m in (maps[0].mT, maps[2])]
    state[0], state[1] = reference.encode(x, inverse[0], maps[1], 3, "key")
    state[2], state[3] = reference.encode(x, inverse[1], maps[3], 4, "value")
    state[4:] = [t[:, :, :0] for t in state[4:]]
    check((*args[:3], *state, *args[11:17], 0, *args[18:]), bits)


def run_ptx(asm: str, word: int, dtype: torch.dtype) -> list[float]:
    """The eight results of a `levels_asm` string, computed instruction by instruction; halves are numbers of dtype."""
    registers: dict[str, int] = {"$8": word}
    out = [0.0] * 8

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(x: int) -> torch.Tensor:
        return torch.tensor([x & 0xFFFF, x >> 16], dtype=torch.int32).to(torch.int16).view(dtype).double()

    for op, where, args in re.findall(r"(\S+) (\w+|{[^}]*}), (.*?);", asm.removeprefix("{ .reg .b32 w, x, m, c;")):
        names = args.split(", ")
        if where.startswith("{"):
            for name, x in zip(where.strip("{}").split(", "), halves(value(names[0])), strict=True):
                out[int(name[1:])] = float(x)
        elif op == "prmt.b32":
            source = value(names[0]) | value(names[1]) << 32
            selectors = [value(names[2]) >> 4 * n & 7 for n in range(4)]
            registers[where] = sum((source >> 8 * s & 0xFF) << 8 * n for n, s in enumerate(selectors))
        elif op.startswith("fma.rn"):
            x, m, c = (halves(value(name)) for name in names)
            low, high = ((x * m + c).to(dtype).view(torch.int16).int() & 0xFFFF).tolist()
            registers[where] = low | high << 16
        else:
            x, *rest = (value(name) for name in names)
            y = rest[0] if rest else 0
            registers[where] = {"mov.b32": x, "shr.u32": x >> y, "and.b32": x & y}[op]
    return out


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("bits", [b for b in BITS if b < 8])
def test_ptx_gives_levels(bits: int, key: bool, rng: torch.Generator) -> None:
    """Every nibble of random words, in `_levels8`'s order: bits 0, 2, 1 of its number for keys, 0, 1, 2 for values."""
    nibbles = [a + 4 * b + 2 * c if key else a + 2 * b + 4 * c for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    for dtype in (torch.float16, torch.bfloat16):
        unit = levels.level_unit(bits, dtype, True)
        for word in torch.randint(2**32, (50,), generator=rng).tolist():
            codes = [word >> (4 * n + (bits == 3)) & ((1 << bits) - 1) for n in nibbles]
            assert run_ptx(levels.levels_asm(bits, key, dtype), word, dtype) == [
                codebook(bits).levels[c] * unit for c in codes
            ]


def test_strided_vectors(rng: torch.Generator) -> None:
    """Rows taken out of a larger cache leave `start` strided."""
    args, bits = problem(rng, logits=True)
    strided = list(args)
    strided[12], strided[-1] = args[12].repeat_interleave(2)[::2], args[-1].repeat_interleave(3)[::3]
    assert strided[12].stride() == (2,)
    check(tuple(strided), bits)


# What decode_attention.few_queries takes, in bf16 unless said: 200 tokens and 2 heads to a KV head if not said.
FEW = {
    "two queries": {"q_len": 2, "dim": 128},
    "8 rows exactly": {"q_len": 2, "group": 4, "dim": 128, "heads": 2},
    "9 rows": {"q_len": 3, "group": 3, "dim": 128},
    "20 rows": {"q_len": 5, "group": 4, "dim": 128, "heads": 3},
    "35 rows": {"q_len": 5, "group": 7, "dim": 64, "heads": 2},
    "48 rows of one head": {"q_len": 48, "group": 1, "dim": 128},
    "48 rows": {"q_len": 3, "group": 16, "dim": 96},
    "head_dim 256": {"q_len": 4, "group": 8, "dim": 256, "heads": 2},
    "a single query": {"q_len": 1, "group": 4},
    "long rows": {"seen": 9000, "q_len": 5, "group": 4, "dim": 128, "heads": 2, "pad": 3000},
    "fp16": {"dtype": torch.float16, "q_len": 4, "group": 4, "dim": 128},
    "cap and logits": {"group": 7, "q_len": 3, "softcap": 20.0, "logits": True, "dim": 128},
    "logits of many heads": {"group": 16, "q_len": 2, "logits": True, "heads": 2},
    "empty cache": {"seen": 0, "pad": 2},
    "nothing packed": {"seen": 30, "group": 4},
    "all of a row is padding": {"seen": 20, "pad": 40, "q_len": 9},
    "padding inside the new tokens": {"seen": 20, "pad": 24, "logits": True},
    "no sinks": {"sinks": 0, "heads": 2, "group": 1, "q_len": 7},
}


@pytest.mark.parametrize("case", FEW)
def test_few_queries_on_a_gpu(cuda: torch.device, case: str, rng: torch.Generator) -> None:
    for k_bits, v_bits in ((3, 3), (1, 8), (4, 2), (8, 1)):
        args, bits = problem(rng, **{"k_bits": k_bits, "v_bits": v_bits, "dtype": torch.bfloat16} | FEW[case])
        poison_padding(args)
        check(args, bits, "gluon")
        check(args, bits, "auto")
        as_models_have_them = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
        check((*as_models_have_them, *args[3:]), bits, "gluon")


def test_a_few_float32_queries_of_a_16_bit_cache_on_a_gpu(cuda: torch.device, rng: torch.Generator) -> None:
    args, bits = problem(rng, 128, 3, 3, group=4, seen=700, dtype=torch.bfloat16)
    q, k_new, v_new, *rest = (x.float() if i < 3 else x for i, x in enumerate(args))
    want = reference.attention(q.double(), *rest, k_new, v_new, torch.float64)
    got = extend.extend_attention(q, k_new, v_new, *rest, *bits, "gluon").double()
    assert ((got - want).norm() / want.norm()).item() < 1e-3


def test_what_is_not_a_few_queries_says_so(rng: torch.Generator) -> None:
    args, bits = problem(rng, group=4, q_len=13, dtype=torch.float16)
    with pytest.raises(
        ValueError, match="up to 48 queries to a KV head, of all its query heads, these are 52; use impl="
    ):
        extend.extend_attention(*args, *bits, "gluon")
    args, bits = problem(rng)
    with pytest.raises(ValueError, match="not run here: sinks and recent tokens are not 16-bit"):
        extend.extend_attention(*args, *bits, "gluon")
    q, cache = torch.empty(70_000, 1, 2, 64), (torch.empty(1, 1, 4, 64, dtype=torch.float16),) * 4
    assert "a batch of 70000 is more" in decode.few_obstacle(q, cache, cache)
    strided = (cache[0].mT.contiguous().mT,) * 4
    assert "not contiguous from its third" in decode.few_obstacle(q[:1], strided, cache)
    if not torch.cuda.is_available():
        args, bits = problem(rng, dtype=torch.float16)
        with pytest.raises(ValueError, match="it needs an NVIDIA GPU"):
            extend.extend_attention(*args, *bits, "gluon")


@pytest.mark.parametrize(("group", "q_len", "dim"), [(4, 2, 64), (3, 5, 96), (1, 33, 32), (16, 3, 64)])
def test_preparation_of_few_queries(group: int, q_len: int, dim: int, rng: torch.Generator) -> None:
    """The first launch by itself: mapped rows, zeros in rows that are none, counters, and attention to new tokens."""
    import triton

    from tq_ao.kernels.query import prepare_few_kernel

    batch, heads, chunks, counters, factor = 2, 2, 2, 5, 0.3
    per_head, seen, start = decode.padded_group(group * q_len), 3, torch.tensor([0, 4])
    interpreted = triton.knobs.runtime.interpret

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE)

    q = normal(batch, q_len, heads * group, dim).transpose(1, 2)
    k, v = (normal(batch, heads, q_len, dim) for _ in range(2))
    q[1, :, 0] = k[1, :, 0] = v[1, :, 0] = torch.nan  # padding
    map, shift = normal(heads, dim, dim), normal(heads, dim)
    rotated, bias, claims = (
        torch.full((n,), 7.0, device=DEVICE)
        for n in (batch * heads * per_head * dim, batch * heads * per_head, counters)
    )
    claims = claims.int()
    part_o, part_ml = (torch.full((batch * heads, chunks + 1, per_head, n), 7.0, device=DEVICE) for n in (dim, 2))
    columns = min(32, dim)
    maps = heads * -(-batch * per_head // 16) * (dim // columns)
    prepare_few_kernel[(maps + batch * heads * -(-per_head // 16),)](
        q, k, v, torch.tensor(seen, device=DEVICE), start.to(DEVICE), map, shift, rotated, bias, claims,
        part_o, part_ml, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], batch, heads, group, q_len, counters,
        chunks, factor, 0.5, 0.0, G=per_head, D=dim, DP=triton.next_power_of_2(dim), COLUMNS=columns,
        OPERAND=triton.language.float32 if interpreted else triton.language.bfloat16, SOFTCAP=False,
        NEW=max(16, triton.next_power_of_2(q_len)), PRECISION="ieee", PDL=False, num_warps=4,
    )  # fmt: skip
    assert not claims.any()
    q[1, :, 0] = 0
    rows = q.double().unflatten(1, (heads, group)).flatten(2, 3)  # [B, H, G * q_len, D]
    rotated, bias = rotated.double().view(batch, heads, per_head, dim), bias.double().view(batch, heads, per_head)
    real = group * q_len
    torch.testing.assert_close(rotated[:, :, :real], rows @ map.double() * (factor * 0.5), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        bias[:, :, :real], (rows @ shift.double()[:, :, None])[..., 0] * factor, atol=1e-4, rtol=1e-4
    )
    assert not rotated[:, :, real:].any()
    assert not bias[:, :, real:].any()

    top, share = part_ml.double().view(batch, heads, chunks + 1, per_head, 2)[:, :, chunks].unbind(-1)
    o = part_o.double().view(batch, heads, chunks + 1, per_head, dim)[:, :, chunks]
    scores = (rows @ k.double().mT * factor * 0.6931471805599453).unflatten(2, (group, q_len))
    new = torch.arange(q_len, device=DEVICE)
    hidden = (new[None, :] > new[:, None])[None] | (new[None, None, :] < (start.to(DEVICE) - seen)[:, None, None])
    k[1, :, 0] = v[1, :, 0] = 0
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf).flatten(2, 3)
    mass = scores.exp().sum(-1)
    torch.testing.assert_close((top.exp2() * share)[:, :, :real], mass, atol=1e-5, rtol=1e-4)
    want = torch.nan_to_num(torch.softmax(scores, -1)) @ v.double()
    torch.testing.assert_close((o * share[..., None])[:, :, :real], want, atol=1e-4, rtol=1e-4)
    assert not share[:, :, real:].any()
    assert part_o.view(batch, heads, chunks + 1, -1)[:, :, :chunks].eq(7).all(), "the window's parts are the splits'"


def test_no_queries(rng: torch.Generator) -> None:
    args, bits = problem(rng, heads=2)
    q, k_new, v_new, *rest = args
    assert extend.extend_attention(q[:, :, :0], k_new[:, :, :0], v_new[:, :, :0], *rest, *bits).shape == (2, 4, 0, 64)


def test_strides_a_kernel_cannot_follow_are_refused(rng: torch.Generator) -> None:
    args, bits = problem(rng)
    bad = list(args)
    bad[8] = args[8].mT.contiguous().mT
    with pytest.raises(ValueError, match="equal strides"):
        extend.extend_attention(*bad, *bits)
    bad = list(args)
    bad[4] = args[4].mT.contiguous().mT
    with pytest.raises(ValueError, match="contiguous along their last dimension"):
        extend.extend_attention(*bad, *bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_on_a_gpu(cuda: torch.device, dim: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    for width in BITS:
        check(*problem(rng, dim, width, width, heads=2, group=4, seen=1500, q_len=300, dtype=dtype))
