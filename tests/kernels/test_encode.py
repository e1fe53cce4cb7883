"""Encode and append kernels against the reference: in the interpreter without a GPU, on it with one.

Codes may differ from the reference's where a rotated coordinate lies within rounding of a threshold; exact tokens
(sinks, ring) are compared bitwise, and so is everything about which token goes where.
"""

import random
from dataclasses import replace

import layer_state
import pytest
import torch

from tq_ao import reference
from tq_ao.codebook import BITS, ROLES, codebook
from tq_ao.packing import TILE, unpack
from tq_ao.rotation import rotation_maps, rotations

triton = pytest.importorskip("triton")  # exists on Linux only
tl = triton.language
triton_encode = pytest.importorskip("tq_ao.kernels.encode")
pack = pytest.importorskip("tq_ao.kernels.pack")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # the interpreter's: overflow of 1e30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE_ULPS = 2e-3  # two fp16 ulps


def assert_same_tiles(got, want, dim: int, role: str, allowed: float = 1e-3, feedback: bool = False) -> None:
    """Codes equal but for the fraction `allowed`; scales of vectors whose codes agree within two ulps.

    feedback: an even dim's code that differs changes odd ones of its vector, which do not count then.
    """
    bits = reference.bits_of(want[0], dim)
    a, b = (unpack(x[0].cpu(), bits, dim, role) for x in (got, want))
    differ = a != b
    if feedback:
        differ[..., 1::2] &= ~differ[..., 0::2].any(-1, keepdim=True)
    fraction = differ.float().mean().item()
    assert fraction <= (allowed if bits < 8 else 2 * allowed), f"{fraction:.1e} of the codes differ"
    same = ~differ.any(-1)
    s, t = (x[1].cpu().flatten(-2).float()[same] for x in (got, want))
    assert torch.allclose(s, t, rtol=SCALE_ULPS, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("feedback", [False, True])
def test_encode_equals_the_reference(
    feedback: bool, bits: int, dim: int, role: str, rng: torch.Generator, seed: int
) -> None:
    dtype = random.Random(seed + bits + dim).choice([torch.float32, torch.float16, torch.bfloat16])
    maps = layer_state.maps(2, dim, rng, feedback).to(DEVICE)
    x = layer_state.tokens(2, 2, 75, dim, rng, dtype).to(DEVICE)
    got = triton_encode.encode(x, maps.key, maps.key_shift, codebook(bits), role, maps.key_feedback)
    want = reference.encode(x, maps.key, maps.key_shift, bits, role, maps.key_feedback)
    assert [t.shape for t in got] == [t.shape for t in want]
    assert_same_tiles(got, want, dim, role, feedback=feedback)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dim", [96, 128, 256])
def test_whole_blocks_equal_the_reference(
    dim: int, parts: int, shifted: bool, role: str, rng: torch.Generator, seed: int
) -> None:
    """Two blocks of four tiles, which need no masks, between them and the end one that does."""
    map = rotation_maps("dense", 1, dim, seed).key if parts == 1 else rotations("dense", 1, dim, seed)
    assert (map == map.bfloat16()).all() == (parts == 1)
    shift = torch.randn(1, dim, generator=rng) * shifted
    x = layer_state.tokens(1, 1, 300, dim, rng, torch.bfloat16)
    got = triton_encode.encode(x.to(DEVICE), map.to(DEVICE), shift.to(DEVICE), codebook(3), role)
    assert_same_tiles(got, reference.encode(x, map, shift, 3, role), dim, role)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_whole_blocks_with_feedback_equal_the_reference(
    dim: int, role: str, rng: torch.Generator, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads, each with its own feedback, and a map of one or two parts; without a GPU as on a Hopper chip."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_encode, "shared_kib", lambda device: 228)
    draw = random.Random(seed + dim)
    bits, parts = draw.choice(BITS), draw.choice([1, 2])
    maps = layer_state.maps(2, dim, rng, feedback=True)
    map = maps.value.bfloat16().float() if parts == 1 else maps.value
    shift = maps.value_shift * draw.choice([0, 1])
    x = layer_state.tokens(1, 2, 600 if dim == 256 else 300, dim, rng, torch.bfloat16)  # more than two blocks
    on_device = (t.to(DEVICE) for t in (x, map, shift))
    got = triton_encode.encode(*on_device, codebook(bits), role, maps.value_feedback.to(DEVICE))
    want = reference.encode(x, map, shift, bits, role, maps.value_feedback)
    assert_same_tiles(got, want, dim, role, feedback=True)


@pytest.mark.parametrize("bits", BITS)
def test_empty_even_dims_with_feedback_equal_the_reference(bits: int, rng: torch.Generator) -> None:
    dim = 64
    maps = layer_state.maps(1, dim, rng, feedback=True).to(DEVICE)
    y = torch.randn(1, 1, 64, dim, generator=rng)
    y[..., 0::2] *= torch.tensor([0.01, 0.1]).repeat(32)[:, None]
    x = y.to(DEVICE) @ torch.linalg.inv(maps.key) + maps.key_shift[:, None]
    got = triton_encode.encode(x, maps.key, maps.key_shift, codebook(bits), "key", maps.key_feedback)
    want = reference.encode(x, maps.key, maps.key_shift, bits, "key", maps.key_feedback)
    assert_same_tiles(got, want, dim, "key", 4e-3, feedback=True)


@pytest.mark.parametrize("role", ROLES)
def test_feedback_changes_the_codes_of_odd_dims_only(role: str, rng: torch.Generator) -> None:
    dim, bits = 64, 3
    maps = layer_state.maps(1, dim, rng, feedback=True).to(DEVICE)
    x = layer_state.tokens(1, 1, 160, dim, rng).to(DEVICE)
    with_feedback, without = (
        unpack(triton_encode.encode(x, maps.key, maps.key_shift, codebook(bits), role, f)[0].cpu(), bits, dim, role)
        for f in (maps.key_feedback, None)
    )
    differ = (with_feedback != without).float()
    assert differ[..., 0::2].mean() < 1e-3
    assert differ[..., 1::2].mean() > 0.05


@triton.jit
def quantize_kernel(
    y, codes, scales, N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, OPERAND: tl.constexpr
):
    at = tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :]
    code, scale = pack.quantize(tl.load(y + at), None, D, BITS, STEP, OPERAND)
    tl.store(codes + at, code.to(tl.uint8))
    tl.store(scales + tl.arange(0, N), scale)


@pytest.mark.parametrize("bits", BITS)
def test_quantizing_equals_the_reference_on_the_same_numbers(bits: int, rng: torch.Generator) -> None:
    """All but numbers within rounding of a threshold; one multiply-add where the device has it."""
    y = torch.randn(512, 64, generator=rng) * torch.logspace(-2, 3, 512)[:, None]
    y[0], y[1, ::2], y[2] = 0.0, 0.0, -0.0
    want = reference.quantize(y, bits)
    codes = torch.zeros(512, 64, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(512, device=DEVICE)
    quantize_kernel[(1,)](
        y.to(DEVICE), codes, scales, N=512, D=64, BITS=bits, STEP=codebook(bits).step, OPERAND=triton_encode._operand()
    )
    magic = 1 if bits == 1 else 0  # what the float's bits add to the lowest byte
    differ = codes.cpu() - magic != want[0]
    assert differ.float().mean() < 1e-4
    assert not differ[:3].any()
    same = ~differ.any(-1)
    assert torch.allclose(scales.cpu()[same], want[1][same].float(), rtol=SCALE_ULPS, atol=1e-7)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_hadamard_map_needs_no_remainder(dim: int, rng: torch.Generator, seed: int) -> None:
    map = rotations("hadamard", 1, dim, seed).to(DEVICE)
    x = layer_state.tokens(1, 1, 40, dim, rng, torch.bfloat16).to(DEVICE)
    shift = torch.zeros(1, dim, device=DEVICE)
    got = triton_encode.encode(x, map, shift, codebook(4), "value")
    assert_same_tiles(got, reference.encode(x, map, shift, 4, "value"), dim, "value", 2e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("feedback", [False, True])
def test_zero_and_broken_vectors(feedback: bool, bits: int, rng: torch.Generator) -> None:
    dim = 64
    matrix = layer_state.maps(1, dim, rng, feedback).to(DEVICE).key_feedback
    x = torch.zeros(1, 1, 32, dim, device=DEVICE)
    x[0, 0, 1, 3] = 1e4
    x[0, 0, 2, 0] = torch.nan
    x[0, 0, 3] = 1e30
    map = rotations("dense", 1, dim, 0).to(DEVICE)
    _, scales = triton_encode.encode(x, map, torch.zeros(1, dim, device=DEVICE), codebook(bits), "key", matrix)
    scales = scales.flatten()
    assert scales[0] == 0
    assert scales[1] > 0
    assert scales[2].isnan()
    assert scales[3] == 65504
    assert not scales[4:].any()


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
]


@pytest.mark.parametrize(("dim", "k_bits", "v_bits", "sinks", "window", "spare", "chunks"), CASES)
@pytest.mark.parametrize("feedback", ["none", "key", "value", "both"])
def test_append_equals_the_reference(
    feedback: str, dim: int, k_bits: int, v_bits: int, sinks: int, window: int, spare: int, chunks: list[int],
    rng: torch.Generator,
) -> None:  # fmt: skip
    total, heads = sum(chunks), 2
    pad = int(torch.randint(1, 60, (), generator=rng))
    maps = layer_state.maps(heads, dim, rng, feedback != "none").to(DEVICE)
    if feedback in ROLES:
        maps = replace(maps, **{f"{role}_feedback": None for role in ROLES if role != feedback})
    start = torch.tensor([0, pad], device=DEVICE)
    k, v = (layer_state.tokens(2, heads, total, dim, rng, torch.float16).to(DEVICE) for _ in range(2))
    got, want = (
        layer_state.empty_cache(
            2, heads, dim, total, k_bits, v_bits, sinks, window, window + 64 + spare, torch.float16, DEVICE
        )
        for _ in range(2)
    )
    run_append(
        triton_encode.append_,
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
    assert_same_tiles(got[:2], want[:2], dim, "key", feedback=feedback in ("key", "both"))
    assert_same_tiles(got[2:4], want[2:4], dim, "value", feedback=feedback in ("value", "both"))
    packed = reference.packed_tokens(total, sinks, window, window + 64) // TILE
    assert not got[1][0, :, :packed].isnan().any()
    assert got[1][0, :, packed:].isnan().all()


def test_tiles_beyond_the_buffer_are_dropped(rng: torch.Generator) -> None:
    maps = layer_state.maps(1, 64, rng).to(DEVICE)
    k = layer_state.tokens(1, 1, 200, 64, rng).to(DEVICE)
    state = layer_state.empty_cache(1, 1, 64, 96, device=DEVICE)
    whole = layer_state.empty_cache(1, 1, 64, 96 + 64, device=DEVICE)
    view = [t[:, :, :3] if i < 4 else t for i, t in enumerate(whole)]
    start = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for chunks in ([200], [150, 20, 30]):
        for target in (state, view):
            run_append(triton_encode.append_, target, k, k, chunks, start, maps, 32, codebook(3), codebook(4))
        assert whole[1][:, :, 3:].isnan().all()
        assert (whole[0][:, :, 3:] == 0xFF).all()


def test_errors_say_what_to_do(rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 64, rng)
    k = layer_state.tokens(2, 2, 3, 64, rng)
    books = codebook(3), codebook(4)
    place = torch.tensor(0), torch.tensor([0, 0]), maps.key, maps.key_shift, maps.value, maps.value_shift
    with pytest.raises(ValueError, match="ring of at least window \\+ 64 = 96 slots, got 80"):
        triton_encode.append_(*layer_state.empty_cache(capacity=80), k, k, *place, 32, *books)
    with pytest.raises(ValueError, match="ring's dtype torch.float32, got torch.float16"):
        triton_encode.append_(*layer_state.empty_cache(), k.half(), k.half(), *place, 32, *books)
    state = layer_state.empty_cache()
    state[0] = torch.zeros(2, 2, 768, 8, dtype=torch.uint8).mT
    with pytest.raises(ValueError, match="contiguous along their last dimension"):
        triton_encode.append_(*state, k, k, *place, 32, *books)


def test_append_in_a_cuda_graph_follows_the_length_on_the_device(cuda: torch.device, rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 128, rng).to(cuda)
    got, want = (layer_state.empty_cache(dim=128, dtype=torch.bfloat16, device=cuda) for _ in range(2))
    start, length = torch.tensor([0, 9], device=cuda), torch.tensor(0, device=cuda)
    k, v = (torch.zeros(2, 2, 1, 128, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    read = maps.key, maps.key_shift, maps.value, maps.value_shift, 32

    def step() -> None:
        triton_encode.append_(*got, k, v, length, start, *read, codebook(3), codebook(4))

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
    assert_same_tiles(got[:2], want[:2], 128, "key")
    assert_same_tiles(got[2:4], want[2:4], 128, "value")


def test_offsets_beyond_two_to_the_31(cuda: torch.device) -> None:
    n = 2_200_000
    x = torch.empty(1, 8, n, 128, dtype=torch.bfloat16, device=cuda).normal_()
    map, shift = rotations("hadamard", 8, 128, 3).to(cuda), torch.zeros(8, 128, device=cuda)
    codes, scales = triton_encode.encode(x, map, shift, codebook(3), "key")
    want = reference.encode(x[:, :, -64:], map, shift, 3, "key")
    assert_same_tiles((codes[:, :, -2:], scales[:, :, -2:]), want, 128, "key")
