"""Decode attention kernels against the float64 reference on the same codes.

Without a GPU the plain Triton path runs in the interpreter; with one, every path runs on it.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tq_ao import reference
from tq_ao.packing import TILE, tile_bytes

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Case(NamedTuple):
    """Shape of one decode step; `lengths` are the tokens of each row."""

    head_dim: int = 64
    group: int = 4
    k_bits: int = 3
    v_bits: int = 3
    lengths: tuple[int, ...] = (150,)
    heads: int = 1
    sinks: int = 4
    window: int = 32
    ring: bool = True
    softcap: float = 0.0
    sink_logits: bool = False
    dtype: torch.dtype = torch.float32
    shifted: bool = True


def make(case: Case, rng: torch.Generator, capacity_tiles: int | None = None) -> dict:
    """Random tensors of a decode step: codes are uniform, unused slots and scales are poisoned."""
    rows, dim, heads = len(case.lengths), case.head_dim, case.heads
    longest = max(case.lengths)
    tiles = capacity_tiles or -(-max(1, longest) // TILE)
    ring = (-(-(case.window + 64) // TILE) + 1) * TILE if case.ring else 0

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    def codes(bits: int) -> torch.Tensor:
        x = torch.randint(0, 256, (rows, heads, tiles, tile_bytes(bits, dim)), generator=rng).to(torch.uint8)
        return x.where(x != 128, 127) if bits == 8 else x  # no encoder writes -128

    length = torch.tensor(longest + 3)
    start = length - torch.tensor(case.lengths)
    cache = {"k_codes": codes(case.k_bits), "k_scales": torch.rand(rows, heads, tiles, TILE, generator=rng) + 0.5}
    cache |= {"v_codes": codes(case.v_bits), "v_scales": torch.rand(rows, heads, tiles, TILE, generator=rng) + 0.5}
    for b, n in enumerate(case.lengths):
        packed = reference.packed_tokens(n, case.sinks, case.window, ring)
        for name in ("k_scales", "v_scales"):
            cache[name][b].flatten(1)[:, packed:] = torch.nan
    for name in ("k_scales", "v_scales"):
        cache[name] = cache[name].half()
    for name, slots in (("sinks", case.sinks), ("recent", ring)):
        for role in "kv":
            cache[f"{role}_{name}"] = normal(rows, heads, slots, dim).to(case.dtype)
    shift = 1.0 if case.shifted else 0.0
    maps = {
        "query_map": normal(heads, dim, dim) / dim**0.5,
        "key_shift": shift * normal(heads, dim),
        "output_map": normal(heads, dim, dim) / dim**0.5,
        "value_shift": shift * normal(heads, dim),
    }
    args = {
        "q": normal(rows, heads * case.group, 1, dim).to(case.dtype),
        **cache,
        "length": length,
        "start": start,
        **maps,
    }
    args |= {"window": case.window, "scale": dim**-0.5, "softcap": case.softcap}
    args["sink_logits"] = normal(heads * case.group) if case.sink_logits else None
    return args


def to(args: dict, device: torch.device) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def errors(case: Case, args: dict, run: Callable[..., torch.Tensor], impl: str) -> torch.Tensor:
    """Relative error against float64 of each row and head."""
    exact = dict(args, q=args["q"].double())
    expected = reference.attention(**exact, dtype=torch.float64)
    out = run(**to(args, DEVICE), k_bits=case.k_bits, v_bits=case.v_bits, impl=impl)
    assert out.dtype == args["q"].dtype and out.shape == args["q"].shape
    difference = (out.cpu().double() - expected).norm(dim=-1)
    return difference / expected.norm(dim=-1).clamp_min(1e-6)


def error(case: Case, args: dict, run: Callable[..., torch.Tensor], impl: str) -> float:
    """Largest relative error of a row and head against float64."""
    return errors(case, args, run, impl).max().item()


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.empty return NaN, or sevens."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **o: empty(*size, **o).fill_(7 if "int" in str(o) else torch.nan))


PATHS = ["triton", "gluon"] if CUDA else ["triton"]  # Gluon has no interpreter
CASES = {
    "bits 3": Case(),
    "bits 1": Case(k_bits=1, v_bits=1),
    "bits 2": Case(k_bits=2, v_bits=2),
    "bits 4": Case(k_bits=4, v_bits=4),
    "bits 8": Case(k_bits=8, v_bits=8),
    "bits 4 and 1": Case(k_bits=4, v_bits=1),
    "bits 2 and 8": Case(k_bits=2, v_bits=8),
    "head_dim 32": Case(head_dim=32),
    "head_dim 96": Case(head_dim=96),
    "head_dim 96, 4 and 2 bits": Case(head_dim=96, k_bits=4, v_bits=2),
    "head_dim 128": Case(head_dim=128, lengths=(230,)),
    "head_dim 256": Case(head_dim=256, group=2),
    "head_dim 288": Case(head_dim=288, group=2),
    "group 1": Case(group=1),
    "group 7": Case(group=7),
    "group 8": Case(group=8, heads=2),
    "group 16": Case(group=16),
    "group 24": Case(group=24),
    "rows of different length": Case(lengths=(200, 17, 101, 3), heads=2),
    "one row is padding": Case(lengths=(100, 0)),
    "nothing packed": Case(lengths=(36,)),
    "fewer tokens than sinks": Case(lengths=(2,)),
    "no sinks": Case(sinks=0),
    "no ring, partial last tile": Case(ring=False, lengths=(75, 41)),
    "no ring, no sinks": Case(ring=False, sinks=0, lengths=(64,)),
    "one tile": Case(lengths=(68,)),
    "soft-cap": Case(softcap=5.0),
    "sink logits": Case(sink_logits=True, group=2, heads=2),
    "fp16": Case(dtype=torch.float16),
    "bf16": Case(dtype=torch.bfloat16, head_dim=128, lengths=(230,)),
}


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, impl: str, rng: torch.Generator) -> None:
    from tq_ao.kernels.decode_attention import decode_attention

    case = CASES[name]
    rounding = {torch.float16: 2e-3, torch.bfloat16: 4e-3 if CUDA else 5e-3}  # of the output; the interpreter truncates
    limit = rounding.get(case.dtype, 1e-3 if impl == "gluon" else 3e-5)
    assert error(case, make(case, rng), decode_attention, impl) < limit


@pytest.mark.parametrize("name", CASES)
def test_gluon_attends_to_a_16_bit_window_itself(name: str, cuda: torch.device, rng: torch.Generator) -> None:
    from tq_ao.kernels.decode_attention import decode_attention

    case = CASES[name]._replace(dtype=torch.float16)
    assert error(case, make(case, rng), decode_attention, "gluon") < 2e-3


@pytest.mark.parametrize("size", [1e-3, 1.0, 2e3])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 288])
def test_partial_outputs_in_16_bits(head_dim: int, size: float, cuda: torch.device, rng: torch.Generator) -> None:
    """Large and small values: partial outputs are relative to their mass, and no output rounding hides their error.

    Probabilities and partial outputs are rounded to 16 bits, by at most 2 ** -11 each.  Both in full is the limit of a
    row; of all rows, the root mean square was 1.3e-4 to 3.3e-4 in 375 draws, and the worst row 6.6e-4.
    """
    from tq_ao.kernels.decode_attention import decode_attention

    case = Case(head_dim=head_dim, group=5, lengths=(700, 90), dtype=torch.float16, shifted=False)
    args = make(case, rng)
    args["q"] = args["q"].float()
    for name in ("v_scales", "v_sinks", "v_recent"):
        args[name] = args[name] * size
    relative = errors(case, args, decode_attention, "gluon")
    assert relative.max() < 2**-10 and relative.square().mean().sqrt() < 4e-4, "16 bits end at 6e-8"


@pytest.mark.parametrize("impl", PATHS)
def test_zero_queries_and_broken_keys(impl: str, rng: torch.Generator) -> None:
    from tq_ao.kernels.decode_attention import decode_attention

    case = Case(lengths=(100,), heads=2)  # one packed tile and a part of the ring: a masked step
    args = make(case, rng)
    args["q"][:, 1] = 0
    assert error(case, args, decode_attention, impl) < (1e-3 if impl == "gluon" else 3e-5)
    args["k_sinks"][0, 1, 0, 0] = torch.nan
    out = decode_attention(**to(args, DEVICE), k_bits=3, v_bits=3, impl=impl)
    assert out[0, 4:].isnan().all() and not out[0, :4].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", PATHS)
def test_every_split_is_merged(
    impl: str, dtype: torch.dtype, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More splits than steps: some are empty, and their memory, here full of NaN, does not count."""
    from tq_ao.kernels import decode_attention as module

    monkeypatch.setattr(module, "plan", lambda *_: (7, 32))
    poison_empty(monkeypatch)
    case = Case(head_dim=128, lengths=(300, 5), heads=1, dtype=dtype)
    limit = 2e-3 if dtype == torch.float16 else 1e-3 if impl == "gluon" else 3e-5
    assert error(case, make(case, rng), module.decode_attention, impl) < limit


@pytest.mark.parametrize("plan", [(5, 64), (5, 192), (11, 64), (23, 64)])
def test_splits_claim_steps(
    plan: tuple[int, int], cuda: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows beside short ones: each step is attended to once; if asked, with the same rounding each time."""
    from tq_ao.kernels import decode_attention as module

    monkeypatch.setattr(module, "plan", lambda *_: plan)
    poison_empty(monkeypatch)
    # Of 5 splits 93, 0, 43, 52, 9, 20, 20 and 19 steps of 64 tokens: from 20 on they are claimed.
    lengths = (6100, 9, 2900, 3456, 700, 1412, 1380, 1348)
    case = Case(head_dim=128, lengths=lengths, heads=2, window=128, dtype=torch.bfloat16)
    args = make(case, rng)
    assert error(case, args, module.decode_attention, "gluon") < 4e-3
    on_gpu = to(dict(args, q=args["q"].float()), cuda)
    run = partial(module.decode_attention, **on_gpu, k_bits=case.k_bits, v_bits=case.v_bits, impl="gluon")
    claimed = run()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert ((claimed - first).norm(dim=-1) / first.norm(dim=-1)).max() < 2e-3, "twice what either may be wrong by"


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_merges_many_queries(
    head_dim: int, cuda: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a chip with few multiprocessors does, a large one does for thousands of queries; here no multiple of 16."""
    from tq_ao.kernels import decode_attention as module

    monkeypatch.setattr(module, "multiprocessors", lambda _: 1)
    for rows in (5, 3):
        case = Case(head_dim=head_dim, lengths=(300, 150, 36, 64, 201)[:rows], group=7, heads=2, dtype=torch.bfloat16)
        assert error(case, make(case, rng), module.decode_attention, "gluon") < 4e-3


@pytest.mark.parametrize("splits", [44, 79])
def test_merges_many_splits_of_many_queries(
    splits: int, cuda: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns, which leave registers to two programs on a multiprocessor."""
    from tq_ao.kernels import decode_attention as module

    monkeypatch.setattr(module, "plan", lambda *_: (splits, 32))
    monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    poison_empty(monkeypatch)
    case = Case(head_dim=128, lengths=tuple(range(100, 1900, 200)), heads=4, group=8, dtype=torch.bfloat16)
    assert module.merge_config(128, 288, splits, 132).parts == 16
    assert error(case, make(case, rng), module.decode_attention, "gluon") < 4e-3


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("group", [5, 12, 16, 24])
def test_two_tiles_to_a_step(
    group: int, head_dim: int, cuda: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of long rows; here odd and even numbers of tiles, and none."""
    from tq_ao.kernels import decode_attention as module

    tile_bytes = 4 * head_dim * 6 + 128
    long = module.configure(head_dim, -(-group // 8), tile_bytes, row_tiles=10_000, work=10_000, shared=228)
    assert (long.head_tiles, long.tiles) == (1 + (group > 8), 2)
    monkeypatch.setattr(module, "configure", lambda *_, **__: long)
    case = Case(head_dim=head_dim, group=group, lengths=(1900, 300, 230, 20), heads=2, dtype=torch.bfloat16)
    assert error(case, make(case, rng), module.decode_attention, "gluon") < 4e-3


def test_every_step_is_claimed_once(seed: int) -> None:
    """The device code, on Python integers: splits that come in any order do each step of a row once."""
    pytest.importorskip("triton.experimental.gluon")
    from tq_ao.kernels import decode_gluon

    names = SimpleNamespace(minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b)
    first_step, dealt_out, after = (
        FunctionType(getattr(decode_gluon, name).fn.__code__, {"gl": names})
        for name in ("_first_step", "_dealt_out", "_after")
    )
    draw = random.Random(seed)

    def split(first: int, end: int, steps: int, dealt: int, claims: list[int], done: list[int]) -> Iterator[None]:
        """What gluon_splits_kernel does with one split, a pause before each claim."""

        def claim(count: int) -> int:
            claims[0] += count
            return dealt + claims[0] - count

        step, following = after(first - 1, end, steps), after(first, end, steps)
        if following == steps and dealt < steps:
            yield
            wanted = 1 if first < end else 2
            claimed = claim(wanted)
            following = claimed + wanted - 1
            step = claimed if wanted == 2 else step
        while step < steps:
            done.append(step)
            then = after(following, end, steps)
            if then == steps and following < steps and dealt < steps:
                yield
                then = claim(1)
            step, following = following, then

    for _ in range(300):
        splits, chunks = draw.randint(1, 40), draw.randint(0, 6)
        steps = max(0, draw.choice([draw.randint(0, 400), draw.choice([4, 8]) * splits + draw.randint(-2, 2)]))
        dealt = dealt_out(steps, splits, draw.choice([4, 2, 0]))
        assert dealt == steps or 2 * dealt >= steps, "at most half are claimed"
        bounds = [first_step(i, splits, dealt, min(chunks, splits), 12) for i in range(splits + 1)]
        claims, done = [0], []  # type: ignore[var-annotated]
        waiting = [split(a, b, steps, dealt, claims, done) for a, b in pairwise(bounds)]
        while waiting:
            one = draw.choice(waiting)
            if next(one, "ended") == "ended":
                waiting.remove(one)
        assert sorted(done) == list(range(steps))


def test_splits_share_exact_tokens_and_steps_evenly(seed: int) -> None:
    """The device code, on Python integers: an exact chunk counts as so many quarters of a step."""
    pytest.importorskip("triton.experimental.gluon")
    from tq_ao.kernels.decode_gluon import _first_step

    on_host = FunctionType(_first_step.fn.__code__, {"gl": SimpleNamespace(minimum=min, maximum=max)})
    draw = random.Random(seed)
    for _ in range(300):
        splits, steps = draw.randint(1, 512), draw.choice([draw.randint(0, 40), draw.randint(0, 33_000), 500_000])
        chunks = draw.randint(0, draw.choice([min(6, splits), splits]))
        quarters = draw.randint(0, draw.choice([40, 2000]))
        numbers = np.array([splits, steps, chunks, quarters], np.int32)  # as on the device
        with np.errstate(over="raise"):
            first = [int(on_host(np.int32(i), *numbers)) for i in range(splits + 1)]
        assert first[0] == 0 and first[-1] == steps
        shares = [b - a for a, b in pairwise(first)]
        assert min(shares) >= 0
        if 4 * steps >= quarters * (splits - chunks):  # else a chunk is worth more than a share of the tiles
            work = [share + quarters / 4 * (i < chunks) for i, share in enumerate(shares)]
            assert max(work) - min(work) <= 2
        else:
            assert max(shares[:chunks], default=0) <= 1


@pytest.mark.parametrize(
    ("head_dim", "group", "bits", "row_tiles", "work", "shared", "expected"),
    [
        (128, 4, 3, 128, 0, 228, (1, 1, 12)),  # a row of 4096 tokens is short
        (128, 4, 3, 129, 0, 228, (1, 2, 12)),
        (128, 4, 4, 256, 0, 228, (1, 1, 12)),
        (128, 4, 4, 257, 0, 228, (1, 2, 12)),
        (128, 4, 2, 16, 0, 228, (1, 2, 12)),  # small tiles are never alone
        (64, 8, 3, 16, 0, 228, (1, 2, 12)),
        (96, 1, 3, 16, 0, 228, (1, 1, 12)),
        (96, 1, 3, 200, 0, 228, (1, 2, 12)),
        (128, 4, 8, 1000, 0, 228, (1, 1, 12)),  # two of 8 KiB would leave room for six programs
        (128, 16, 3, 1000, 191, 228, (2, 1, 8)),
        (128, 16, 3, 1000, 192, 228, (2, 2, 8)),
        (128, 16, 3, 23, 1000, 228, (2, 1, 8)),
        (128, 16, 2, 1000, 192, 228, (2, 1, 8)),  # would spill
        (64, 16, 2, 1000, 192, 228, (2, 2, 8)),
        (256, 16, 3, 1000, 1000, 228, (1, 1, 8)),
        (128, 4, 3, 1000, 0, 164, (1, 2, 8)),
        (128, 4, 3, 1000, 0, 100, (1, 2, 4)),
        (256, 8, 8, 1000, 0, 100, (1, 1, 3)),
    ],
)
def test_configure(
    head_dim: int, group: int, bits: int, row_tiles: int, work: int, shared: int, expected: tuple[int, int, int]
) -> None:
    """Head tiles, tiles to a step and programs to a multiprocessor, each side of every limit."""
    from tq_ao.kernels.decode_attention import configure

    tile_bytes = TILE * head_dim * 2 * bits // 8 + 4 * TILE
    config = configure(head_dim, -(-group // 8), tile_bytes, row_tiles=row_tiles, work=work, shared=shared)
    assert (config.head_tiles, config.tiles, config.resident) == expected


@pytest.mark.parametrize(
    ("programs", "tiles", "at_once", "expected"),
    [
        (48, 512, 32, 32),  # 33 programs run at once
        (40, 512, 32, 32),  # 39: the others get 2.9 tiles more each
        (40, 1024, 32, 39),  # 5.7
        (36, 512, 32, 44),  # a quarter
        (24, 1024, 64, 64),
        (8, 50_000, 128, 198),
        (176, 200, 8, 8),
        (400, 200, 8, 3),
    ],
)
def test_plans_leave_out_what_takes_the_merge_another_turn(
    programs: int, tiles: int, at_once: int, expected: int
) -> None:
    from tq_ao.kernels.decode_attention import configure, plan

    config = configure(128, 1, 3200, row_tiles=tiles, work=0, shared=228)
    assert plan(programs, tiles, 164, 132 * config.resident, config, lambda _: at_once)[0] == expected


def test_plans_leave_no_exact_token_without_a_split(seed: int) -> None:
    """Of any shape: a chunk each for the first splits, none more than a split adds up exactly, none for nothing."""
    from tq_ao.kernels.decode_attention import MAX_SPLIT_TOKENS, MAX_SPLITS, configure, merge_config, plan

    draw = random.Random(seed)
    for _ in range(3000):
        programs, tiles = int(2 ** draw.uniform(0, 16)), int(2 ** draw.uniform(0, 15)) - draw.randint(0, 1)
        head_dim, head_tiles = draw.choice([32, 64, 96, 128, 160, 256, 288]), draw.randint(1, 4)
        tile_bytes = TILE * head_dim * draw.randint(2, 16) // 8 + 4 * TILE
        work, shared, sms = draw.choice([0, 1000]), draw.choice([64, 100, 164, 228]), draw.choice([80, 132, 148])
        config = configure(head_dim, head_tiles, tile_bytes, row_tiles=tiles, work=work, shared=shared)
        assert 1 <= config.resident <= 12 and (config.resident < 4 or config.resident % 4 == 0)
        rows = programs * draw.randint(1, 16)
        exact = draw.choice([0, 1, draw.randint(1, 400), draw.randint(1, 5000)])
        slots = sms * config.resident
        splits, chunk = plan(
            programs, tiles, exact, slots, config,
            lambda splits, shape=(head_dim, rows, sms): merge_config(*shape[:2], splits, shape[2]).parts,
        )  # fmt: skip
        assert 1 <= splits <= MAX_SPLITS and chunk % TILE == 0 and chunk >= config.chunk
        assert -(-exact // chunk) <= splits
        assert tiles * TILE / splits <= MAX_SPLIT_TOKENS


@pytest.mark.parametrize("change", ["float32", "mixed", "misaligned", "strides"])
def test_windows_that_gluon_does_not_read(change: str) -> None:
    from tq_ao.kernels.decode_attention import _readable_by_gluon as readable

    exact = [torch.zeros(2, 2, 32, 64, dtype=torch.bfloat16) for _ in range(4)]
    assert readable(*exact)
    exact[2] = {
        "float32": exact[2].float(),
        "mixed": exact[2].half(),
        "misaligned": torch.zeros(2 * 2 * 32 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 2, 32, 64),
        "strides": torch.zeros(2, 2 * 32 * 64 + 4, dtype=torch.bfloat16)[:, 4:].unflatten(1, (2, 32, 64)),
    }[change]
    assert not readable(*exact)


@pytest.mark.parametrize("impl", PATHS)
def test_capacity_beyond_the_length(impl: str, rng: torch.Generator) -> None:
    from tq_ao.kernels.decode_attention import decode_attention

    case = Case(lengths=(140, 90))
    assert error(case, make(case, rng, capacity_tiles=20), decode_attention, impl) < (1e-3 if impl == "gluon" else 3e-5)


@pytest.mark.parametrize("impl", PATHS)
def test_strided_vectors_and_maps(impl: str, rng: torch.Generator) -> None:
    """Copied by the launch before the first of ours.  Rows taken out of a larger cache leave `start` strided."""
    from tq_ao.kernels.decode_attention import decode_attention

    case = Case(lengths=(140, 90), heads=2, sink_logits=True)
    args = make(case, rng)
    args["query_map"] = args["query_map"].mT.contiguous().mT
    args["key_shift"] = args["key_shift"][:1].expand(2, -1)
    args["sink_logits"] = args["sink_logits"].repeat_interleave(3)[::3]
    args["start"] = args["start"].repeat_interleave(2)[::2]
    assert error(case, args, decode_attention, impl) < (1e-3 if impl == "gluon" else 3e-5)


@pytest.mark.parametrize(("splits", "chunk"), [(1, 352), (2, 192), (7, 64), (12, 32)])
def test_gluon_shares_a_wide_window_among_splits(
    splits: int, chunk: int, cuda: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many splits as chunks, more of them, and more chunks than the merge takes at a time."""
    from tq_ao.kernels import decode_attention as module

    monkeypatch.setattr(module, "plan", lambda *_: (splits, chunk))
    for head_dim in (64, 128):
        case = Case(head_dim=head_dim, lengths=(700, 340, 5), heads=2, window=300, dtype=torch.float16)
        assert error(case, make(case, rng), module.decode_attention, "gluon") < 2e-3


@pytest.mark.parametrize("impl", PATHS)
def test_strided_cache(impl: str, rng: torch.Generator) -> None:
    """Batch rows taken out of a larger cache keep its strides."""
    from tq_ao.kernels.decode_attention import decode_attention

    case = Case(lengths=(140, 90), heads=2)
    args = make(case, rng)
    for name in ("k_codes", "k_scales", "v_codes", "v_scales", "k_recent", "v_recent"):
        args[name] = torch.stack([args[name], args[name].clone()], 1)[:, 0]
    assert error(case, args, decode_attention, impl) < (1e-3 if impl == "gluon" else 3e-5)


def test_a_million_tokens_and_codes_beyond_two_gigabytes(cuda: torch.device, seed: int) -> None:
    from tq_ao import ops, reference
    from tq_ao.packing import tile_bytes

    batch, heads, dim, length, bits = 6, 8, 128, 1_000_000, 4
    generator = torch.Generator(cuda).manual_seed(seed)
    tiles = -(-(length - 4) // 32)
    shape = (batch, heads, tiles)
    codes = [torch.empty(*shape, tile_bytes(bits, dim), dtype=torch.uint8, device=cuda) for _ in range(2)]
    assert codes[0].numel() > 2**31
    for one in codes:
        one.random_(generator=generator)
    scales = [torch.rand(*shape, 32, generator=generator, device=cuda).half() * 0.3 for _ in range(2)]
    exact = [torch.randn(batch, heads, n, dim, generator=generator, device=cuda) for n in (4, 4, 192, 192)]
    maps = [torch.randn(heads, *n, generator=generator, device=cuda) / dim**0.5 for n in ((dim, dim), (dim,)) * 2]
    q = torch.randn(batch, 4 * heads, 1, dim, generator=generator, device=cuda)
    lengths = torch.tensor(length, device=cuda), torch.zeros(batch, dtype=torch.int64, device=cuda)
    out = ops.decode_attention(
        q, codes[0], scales[0], codes[1], scales[1], *exact, *lengths, *maps, 128, dim**-0.5, impl="gluon"
    )
    last = [x[-1:] for x in (q, codes[0], scales[0], codes[1], scales[1], *exact)]
    want = reference.attention(*last, lengths[0], lengths[1][-1:], *maps, 128, dim**-0.5, dtype=torch.float64)
    assert ((out[-1:] - want).norm() / want.norm()).item() < 1e-3


def test_errors(rng: torch.Generator) -> None:
    from tq_ao.kernels.decode_attention import decode_attention

    case = Case()
    args = make(case, rng) | {"k_bits": 3, "v_bits": 3}
    with pytest.raises(ValueError, match="one query token"):
        decode_attention(**args | {"q": args["q"].expand(-1, -1, 2, -1)})
    with pytest.raises(ValueError, match="expected impl"):
        decode_attention(**args, impl="cuda")
    codes_and_scales = ("k_codes", "k_scales", "v_codes", "v_scales")
    rows = {name: args[name].expand(70_000, -1, -1, -1) for name in ("q", *codes_and_scales)}
    with pytest.raises(ValueError, match="at most 65535 pairs of row and KV head, got 70000 x 1; split the batch"):
        decode_attention(**args | rows)
    many = {name: x[:60_000] for name, x in rows.items()} | {"q": rows["q"][:60_000].repeat(1, 2, 1, 1)}
    with pytest.raises(ValueError, match="at most 262140 queries to a KV head, got 60000 rows of 8; split the batch"):
        decode_attention(**args | many)
    with pytest.raises(ValueError, match="the same strides for the keys and the values of sinks and recent tokens"):
        decode_attention(**args | {"v_recent": torch.cat([args["v_recent"]] * 2, 1)[:, :1]})
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(**args | {"k_codes": args["k_codes"].mT.contiguous().mT})
    if not CUDA:
        with pytest.raises(ValueError, match="impl='gluon' does not run on cpu"):
            decode_attention(**args, impl="gluon")
