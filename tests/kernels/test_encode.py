"""The encode kernel against the reference: in the interpreter without a GPU, on it with one.

Codes may differ from the reference's where a rotated coordinate lies within rounding of a threshold.
"""

import random

import layer_state
import pytest
import torch

from tq_ao import reference
from tq_ao.codebook import BITS, ROLES, codebook
from tq_ao.packing import unpack
from tq_ao.rotation import rotation_maps, rotations

triton = pytest.importorskip("triton")  # exists on Linux only
tl = triton.language
triton_encode = pytest.importorskip("tq_ao.kernels.encode")
operands = pytest.importorskip("tq_ao.kernels.operands")
pack = pytest.importorskip("tq_ao.kernels.pack")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # the interpreter's: overflow of 1e30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("dim", "bits"), [*((64, bits) for bits in BITS), (96, None), (128, None), (256, None)])
@pytest.mark.parametrize("feedback", [False, True])
def test_encode_equals_the_reference(
    feedback: bool, dim: int, bits: int | None, role: str, rng: torch.Generator, seed: int
) -> None:
    """Of a dim, each run draws the bits."""
    bits = bits or random.Random(f"{seed} {dim} {role} {feedback}").choice(BITS)
    dtype = random.Random(seed + bits + dim).choice([torch.float32, torch.float16, torch.bfloat16])
    maps = layer_state.maps(2, dim, rng, feedback).to(DEVICE)
    x = layer_state.tokens(2, 2, 75, dim, rng, dtype).to(DEVICE)
    got = triton_encode.encode(x, maps.key, maps.key_shift, codebook(bits), role, maps.key_feedback)
    want = reference.encode(x, maps.key, maps.key_shift, bits, role, maps.key_feedback)
    assert [t.shape for t in got] == [t.shape for t in want]
    layer_state.assert_same_tiles(got, want, dim, role, feedback=feedback)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dim", [96, 128, 256])
def test_whole_blocks_equal_the_reference(dim: int, shifted: bool, role: str, rng: torch.Generator, seed: int) -> None:
    """Two blocks of four tiles, that keep a map in one part, and an end that streams it; one in two parts always is."""
    map = torch.cat([rotation_maps("dense", 1, dim, seed).key, rotations("dense", 1, dim, seed)])
    assert [(one == one.bfloat16()).all().item() for one in map] == [True, False]
    shift = torch.randn(2, dim, generator=rng) * shifted
    dtype = random.Random(seed + dim).choice([torch.float32, torch.float16, torch.bfloat16])
    x = layer_state.tokens(1, 2, 300, dim, rng, torch.bfloat16 if dim == 256 else dtype)
    got = triton_encode.encode(x.to(DEVICE), map.to(DEVICE), shift.to(DEVICE), codebook(3), role)
    layer_state.assert_same_tiles(got, reference.encode(x, map, shift, 3, role), dim, role)


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
    layer_state.assert_same_tiles(got, want, dim, role, feedback=True)


def test_operands_are_what_is_multiplied_by(rng: torch.Generator) -> None:
    """Those of other maps make other codes of whole blocks; the tile at the end streams the map that it is given."""
    one, other = (rotation_maps("dense", 1, 64, seed).key.to(DEVICE) for seed in (0, 1))
    x, shift = layer_state.tokens(1, 1, 150, 64, rng).to(DEVICE), torch.zeros(1, 64, device=DEVICE)
    got = triton_encode.encode(x, one, shift, codebook(3), "key", None, operands.prepare(other, shift, "key"))
    parts = [[t[:, :, tiles] for t in got] for tiles in (slice(4), slice(4, 5))]
    layer_state.assert_same_tiles(parts[0], reference.encode(x[:, :, :128], other, shift, 3, "key"), 64, "key")
    layer_state.assert_same_tiles(parts[1], reference.encode(x[:, :, 128:], one, shift, 3, "key"), 64, "key")


def test_operands_of_other_maps_are_refused(rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 64, rng, feedback=True).to(DEVICE)
    x = layer_state.tokens(1, 2, 32, 64, rng).to(DEVICE)
    ahead = operands.prepare(maps.key, maps.key_shift, "key", maps.key_feedback)
    for wrong, came in ((ahead[:1], r"int16 \(1, 5264\)"), (ahead.float(), r"float32 \(2, 5264\)")):
        with pytest.raises(ValueError, match=rf"key operands of int16 \(2, 5264\), got torch.{came}; make them"):
            triton_encode.encode(x, maps.key, maps.key_shift, codebook(3), "key", maps.key_feedback, wrong)
    with pytest.raises(ValueError, match=r"\(2, 4240\), got torch.int16 \(2, 5264\); make them of these maps and"):
        triton_encode.encode(x, maps.key, maps.key_shift, codebook(3), "key", None, ahead)


@pytest.mark.parametrize("dim", [32, 160, 288])
def test_other_head_dims(dim: int, rng: torch.Generator) -> None:
    maps = layer_state.maps(1, dim, rng).to(DEVICE)
    x = layer_state.tokens(1, 1, 40, dim, rng, torch.bfloat16).to(DEVICE)
    got = triton_encode.encode(x, maps.key, maps.key_shift, codebook(3), "key")
    layer_state.assert_same_tiles(got, reference.encode(x, maps.key, maps.key_shift, 3, "key"), dim, "key")


@pytest.mark.parametrize("bits", BITS)
def test_empty_even_dims_with_feedback_equal_the_reference(bits: int, rng: torch.Generator) -> None:
    dim = 64
    maps = layer_state.maps(1, dim, rng, feedback=True).to(DEVICE)
    y = torch.randn(1, 1, 64, dim, generator=rng)
    y[..., 0::2] *= torch.tensor([0.01, 0.1]).repeat(32)[:, None]
    x = y.to(DEVICE) @ torch.linalg.inv(maps.key) + maps.key_shift[:, None]
    got = triton_encode.encode(x, maps.key, maps.key_shift, codebook(bits), "key", maps.key_feedback)
    want = reference.encode(x, maps.key, maps.key_shift, bits, "key", maps.key_feedback)
    layer_state.assert_same_tiles(got, want, dim, "key", 4e-3, feedback=True)


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
        y.to(DEVICE),
        codes,
        scales,
        N=512,
        D=64,
        BITS=bits,
        STEP=codebook(bits).step,
        OPERAND=triton_encode.operand_type(),
    )
    magic = 1 if bits == 1 else 0  # what the float's bits add to the lowest byte
    differ = codes.cpu() - magic != want[0]
    assert differ.float().mean() < 1e-4
    assert not differ[:3].any()
    same = ~differ.any(-1)
    assert torch.allclose(scales.cpu()[same], want[1][same].float(), rtol=layer_state.SCALE_ULPS, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("feedback", [False, True])
def test_zero_and_broken_vectors(feedback: bool, bits: int, rng: torch.Generator) -> None:
    """In a whole block, which keeps its map, and at the end, where it is streamed."""
    dim = 64
    matrix = layer_state.maps(1, dim, rng, feedback).to(DEVICE).key_feedback
    x = torch.zeros(1, 1, 160, dim, device=DEVICE)
    x[0, 0, 1::128, 3] = 1e4
    x[0, 0, 2::128, 0] = torch.nan
    x[0, 0, 3::128] = 1e30
    map = rotation_maps("dense", 1, dim, 0).key.to(DEVICE)
    _, scales = triton_encode.encode(x, map, torch.zeros(1, dim, device=DEVICE), codebook(bits), "key", matrix)
    for block in scales.flatten().split(128):
        assert block[0] == 0
        assert block[1] > 0
        assert block[2].isnan()
        assert block[3] == 65504
        assert not block[4:].any()


def test_offsets_beyond_two_to_the_31(cuda: torch.device) -> None:
    n = 2_200_000
    x = torch.empty(1, 8, n, 128, dtype=torch.bfloat16, device=cuda).normal_()
    map, shift = rotations("hadamard", 8, 128, 3).to(cuda), torch.zeros(8, 128, device=cuda)
    codes, scales = triton_encode.encode(x, map, shift, codebook(3), "key")
    want = reference.encode(x[:, :, -128:], map, shift, 3, "key")  # half of the last whole block, and the end
    layer_state.assert_same_tiles((codes[:, :, -4:], scales[:, :, -4:]), want, 128, "key")
