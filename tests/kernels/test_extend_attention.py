"""Extend attention against the float64 reference on the same cache: interpreter without a GPU, on it with one."""

import layer_state
import pytest
import torch

from tq_ao import reference
from tq_ao.codebook import BITS, ROLES, codebook

extend = pytest.importorskip("tq_ao.kernels.extend_attention")  # triton exists on Linux only

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
    """Arguments of `extend_attention` before and after the codebooks' place; unused scales stay NaN."""
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
    return args, (codebook(k_bits, "key"), codebook(v_bits, "value"))


def check(args: tuple, books: tuple) -> None:
    q, k_new, v_new, *rest = args
    want = reference.attention(q.double(), *rest, k_new, v_new, torch.float64)
    got = extend.extend_attention(*args, *books)
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
    check(*problem(rng, **SHAPES[case]))


def test_everything_packed_without_a_ring(rng: torch.Generator) -> None:
    args, books = problem(rng, seen=45, pad=0, sinks=0)
    state, maps = list(args[3:11]), args[13:17]
    x = layer_state.tokens(2, 1, 45, 64, rng).to(DEVICE)
    inverse = [torch.linalg.inv(m.double()).float() for m in (maps[0].mT, maps[2])]
    state[0], state[1] = reference.encode(x, inverse[0], maps[1], 3, "key")
    state[2], state[3] = reference.encode(x, inverse[1], maps[3], 4, "value")
    state[4:] = [t[:, :, :0] for t in state[4:]]
    check((*args[:3], *state, *args[11:17], 0, *args[18:]), books)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [b for b in BITS if b < 8])
def test_lookup_tables_hold_the_grid_values(bits: int, role: str) -> None:
    """The byte permutes of the PTX, done here on its constants, give the levels times the unit."""
    book = codebook(bits, role)
    for dtype in (torch.float16, torch.bfloat16):
        words = [
            int(x, 16) for x in extend.lookup_asm(book, dtype).split() for x in [x.strip(",;")] if x.startswith("0x")
        ]
        tables = words[2:] if bits == 4 else words
        high, low = (tables[0] | tables[1] << 32), (tables[2] | tables[3] << 32)
        count = min(8, 1 << bits)
        entries = [(((high >> 8 * i) & 0xFF) << 8) | ((low >> 8 * i) & 0xFF) for i in range(count)]
        got = torch.tensor(entries, dtype=torch.int32).to(torch.int16).view(dtype)
        want = torch.tensor(extend.grid_values(book)[:count], dtype=torch.float64)
        assert torch.allclose(got.double(), want, rtol=1e-12, atol=0)


def test_strides_a_kernel_cannot_follow_are_refused(rng: torch.Generator) -> None:
    args, books = problem(rng)
    bad = list(args)
    bad[8] = args[8].mT.contiguous().mT
    with pytest.raises(ValueError, match="equal strides"):
        extend.extend_attention(*bad, *books)
    bad = list(args)
    bad[4] = args[4].mT.contiguous().mT
    with pytest.raises(ValueError, match="contiguous along their last dimension"):
        extend.extend_attention(*bad, *books)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_on_a_gpu(cuda: torch.device, dim: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    for bits in BITS:
        check(*problem(rng, dim, bits, bits, heads=2, group=4, seen=1500, q_len=300, dtype=dtype))
