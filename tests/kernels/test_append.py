"""The append kernels against the reference: in the interpreter without a GPU, on it with one.

Exact tokens (sinks, ring) are compared bitwise, and so is everything about which token goes where; codes may differ
where a rotated coordinate lies within rounding of a threshold.
"""

from dataclasses import replace

import layer_state
import pytest
import torch

from tq_ao import reference
from tq_ao.codebook import ROLES, codebook
from tq_ao.packing import TILE

append = pytest.importorskip("tq_ao.kernels.append")  # Triton exists on Linux only
operands = pytest.importorskip("tq_ao.kernels.operands")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # the interpreter's: overflow of 1e30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_append(step, state, k, v, chunks, start, maps, window, *books) -> None:
    seen = 0
    for q in chunks:
        step(
            *state, k[:, :, seen : seen + q], v[:, :, seen : seen + q], torch.tensor(seen, device=DEVICE), start,
            maps.key, maps.key_shift, maps.value, maps.value_shift, window, *books, maps.key_feedback,
            maps.value_feedback,
        )  # fmt: skip
        seen += q


CASES = [
    # dim, k_bits, v_bits, sinks, window, spare ring slots, chunks
    (64, 3, 4, 4, 32, 0, [150, 1, 33]),
    (64, 1, 8, 0, 0, 5, [1] * 34),
    (96, 2, 3, 7, 16, 20, [31, 33, 100, 2]),
    (128, 4, 1, 4, 128, 0, [257, 32]),
    (256, 8, 2, 4, 32, 0, [130, 5]),
    (96, 3, 2, 4, 32, 0, [50, 400]),  # whole blocks behind some that begin in the ring
    (256, 2, 3, 4, 32, 0, [50, 400]),
]


@pytest.mark.parametrize(
    ("feedback", "case"),
    [("none", case) for case in CASES] + [("both", case) for case in CASES] + [("key", CASES[0]), ("value", CASES[0])],
)
def test_append_equals_the_reference(feedback: str, case: tuple, rng: torch.Generator) -> None:
    dim, k_bits, v_bits, sinks, window, spare, chunks = case
    total, heads = sum(chunks), 2
    pad = int(torch.randint(1, 60, (), generator=rng))
    maps = layer_state.maps(heads, dim, rng, feedback != "none").to(DEVICE)
    if max(chunks) >= 400:
        maps = replace(maps, key=maps.key.bfloat16().float(), value=maps.value.bfloat16().float())  # in one part
    if feedback in ROLES:
        maps = replace(maps, **{f"{role}_feedback": None for role in ROLES if role != feedback})
    start = torch.tensor([0, pad], device=DEVICE)
    dtype = torch.bfloat16 if max(chunks) >= 400 else torch.float16
    k, v = (layer_state.tokens(2, heads, total, dim, rng, dtype).to(DEVICE) for _ in range(2))
    got, want = (
        layer_state.empty_cache(2, heads, dim, total, k_bits, v_bits, sinks, window, window + 64 + spare, dtype, DEVICE)
        for _ in range(2)
    )
    run_append(
        append.append_,
        got,
        k,
        v,
        chunks,
        start,
        maps,
        window,
        codebook(k_bits),
        codebook(v_bits),
    )
    run_append(reference.append_, want, k, v, chunks, start, maps, window)
    for a, b in zip(got[4:], want[4:], strict=True):
        assert torch.equal(a, b)
    layer_state.assert_same_tiles(got[:2], want[:2], dim, "key", feedback=feedback in ("key", "both"))
    layer_state.assert_same_tiles(got[2:4], want[2:4], dim, "value", feedback=feedback in ("value", "both"))
    packed = reference.packed_tokens(total, sinks, window, window + 64) // TILE
    assert not got[1][0, :, :packed].isnan().any()
    assert got[1][0, :, packed:].isnan().all()


def test_rows_of_a_larger_cache_and_nothing_to_append(rng: torch.Generator) -> None:
    """They leave `start` strided."""
    maps = layer_state.maps(2, 64, rng).to(DEVICE)
    k, v = (layer_state.tokens(2, 2, 120, 64, rng).to(DEVICE) for _ in range(2))
    start = torch.tensor([0, 99, 31, 99], device=DEVICE)[::2]
    got, want = (layer_state.empty_cache(tokens=120, device=DEVICE) for _ in range(2))
    chunks = [0, 100, 0, 1, 19]
    run_append(append.append_, got, k, v, chunks, start, maps, 32, codebook(3), codebook(4))
    run_append(reference.append_, want, k, v, chunks, start, maps, 32)
    assert all(torch.equal(a, b) for a, b in zip(got[4:], want[4:], strict=True))
    layer_state.assert_same_tiles(got[:2], want[:2], 64, "key")


@pytest.mark.parametrize("q", [20, 150])  # one launch, and several
@pytest.mark.parametrize("transposed", [False, True])
def test_values_may_have_other_strides_than_keys(transposed: bool, q: int, rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 64, rng).to(DEVICE)
    k, v = (layer_state.tokens(2, 2, q, 64, rng).to(DEVICE) for _ in range(2))
    v = v.mT.contiguous().mT if transposed else v.contiguous()
    start = torch.tensor([0, 3], device=DEVICE)
    got, want = (layer_state.empty_cache(tokens=q, device=DEVICE) for _ in range(2))
    run_append(append.append_, got, k, v, [q], start, maps, 32, codebook(3), codebook(4))
    run_append(reference.append_, want, k, v, [q], start, maps, 32)
    assert all(torch.equal(a, b) for a, b in zip(got[4:], want[4:], strict=True))
    layer_state.assert_same_tiles(got[:2], want[:2], 64, "key")
    layer_state.assert_same_tiles(got[2:4], want[2:4], 64, "value")


def test_tiles_beyond_the_buffer_are_dropped(rng: torch.Generator) -> None:
    maps = layer_state.maps(1, 64, rng).to(DEVICE)
    k = layer_state.tokens(1, 1, 200, 64, rng).to(DEVICE)
    state = layer_state.empty_cache(1, 1, 64, 96, device=DEVICE)
    whole = layer_state.empty_cache(1, 1, 64, 96 + 64, device=DEVICE)
    view = [t[:, :, :3] if i < 4 else t for i, t in enumerate(whole)]
    start = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for chunks in ([200], [150, 20, 30]):
        for target in (state, view):
            run_append(append.append_, target, k, k, chunks, start, maps, 32, codebook(3), codebook(4))
        assert whole[1][:, :, 3:].isnan().all()
        assert (whole[0][:, :, 3:] == 0xFF).all()


def test_errors_say_what_to_do(rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 64, rng)
    k = layer_state.tokens(2, 2, 3, 64, rng)
    books = codebook(3), codebook(4)
    place = torch.tensor(0), torch.tensor([0, 0]), maps.key, maps.key_shift, maps.value, maps.value_shift
    with pytest.raises(ValueError, match="ring's dtype torch.float32, got torch.float16"):
        append.append_(*layer_state.empty_cache(), k.half(), k.half(), *place, 32, *books)
    with pytest.raises(ValueError, match="ring's dtype torch.float32, got torch.float32 and torch.float16"):
        append.append_(*layer_state.empty_cache(), k, k.half(), *place, 32, *books)
    for rings, message in (([7], "equal strides"), ([6, 7], "sinks and rings contiguous along their last dimension")):
        state = [t.mT.contiguous().mT if i in rings else t for i, t in enumerate(layer_state.empty_cache())]
        with pytest.raises(ValueError, match=message):
            append.append_(*state, k, k, *place, 32, *books)
    state = layer_state.empty_cache()
    state[0] = torch.zeros(2, 2, 768, 8, dtype=torch.uint8).mT
    with pytest.raises(ValueError, match="contiguous along their last dimension"):
        append.append_(*state, k, k, *place, 32, *books)
    key, value = (reference.prepare(maps.key, maps.key_shift, role) for role in ROLES)
    for given in ((key[:, 8:], value), (key, value[:1])):
        with pytest.raises(ValueError, match=r"operands of int16 \(2, 4240\), got torch.int16 \("):
            append.append_(*layer_state.empty_cache(), k, k, *place, 32, *books, None, None, *given)


def test_operands_are_what_whole_blocks_are_multiplied_by(rng: torch.Generator) -> None:
    """Those of other maps make the codes of other maps."""
    one, other = (
        replace(maps, key=maps.key.bfloat16().float(), value=maps.value.bfloat16().float(), value_feedback=None)
        for maps in (layer_state.maps(2, 64, rng, feedback=True).to(DEVICE) for _ in range(2))
    )
    k, v = (layer_state.tokens(2, 2, 168, 64, rng).to(DEVICE) for _ in range(2))
    key = operands.prepare(other.key, other.key_shift, "key", other.key_feedback)
    value = operands.prepare(other.value, other.value_shift, "value")
    start = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    got, want = (layer_state.empty_cache(tokens=168, device=DEVICE) for _ in range(2))

    def step(*args):
        append.append_(*args, key, value)

    # 132 tokens leave the window: a block of four tiles.
    run_append(step, got, k, v, [168], start, one, 32, codebook(3), codebook(4))
    run_append(reference.append_, want, k, v, [168], start, other, 32)
    layer_state.assert_same_tiles(got[:2], want[:2], 64, "key", feedback=True)
    layer_state.assert_same_tiles(got[2:4], want[2:4], 64, "value")


def test_append_in_a_cuda_graph_follows_the_length_on_the_device(cuda: torch.device, rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 128, rng).to(cuda)
    got, want = (layer_state.empty_cache(dim=128, dtype=torch.bfloat16, device=cuda) for _ in range(2))
    start, length = torch.tensor([0, 9], device=cuda), torch.tensor(0, device=cuda)
    k, v = (torch.zeros(2, 2, 1, 128, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    read = maps.key, maps.key_shift, maps.value, maps.value_shift, 32

    def step() -> None:
        append.append_(*got, k, v, length, start, *read, codebook(3), codebook(4))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(200):
        length.fill_(i)
        k.normal_()
        v.normal_()
        graph.replay()
        reference.append_(*want, k, v, length, start, *read)
    assert all(torch.equal(a, b) for a, b in zip(got[4:], want[4:], strict=True))
    layer_state.assert_same_tiles(got[:2], want[:2], 128, "key")
    layer_state.assert_same_tiles(got[2:4], want[2:4], 128, "value")
