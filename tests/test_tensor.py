"""TurboQuantTensor: codec and geometry of dequantize, storage, moving and cutting, files."""

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable

import layer_state
import pytest
import torch
from packed_layer import PackedLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

from tq_ao import ops, reference
from tq_ao.codebook import BITS, ROLES, Role, codebook, even_levels, gaussian_mse
from tq_ao.packing import TILE
from tq_ao.rotation import LayerMaps, rotation_maps
from tq_ao.tensor import TurboQuantTensor


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=rng).to(dtype)


def oblique_maps(rng: torch.Generator, heads: int, dim: int) -> LayerMaps:
    """Maps that are no rotations, with shifts: what a calibrated layer may have."""
    rotation = rotation_maps("dense", heads, dim, 1)
    stretch = torch.rand(2, heads, dim, generator=rng, dtype=torch.float64) + 0.5
    key, value = (rotation.key.double() * s[:, :, None] for s in stretch)
    maps = [m.float().contiguous() for m in (key, key.inverse().mT, value, value.inverse())]
    return LayerMaps(*maps, 3 * randn(rng, heads, dim), 3 * randn(rng, heads, dim))


def dense64(t: TurboQuantTensor) -> torch.Tensor:
    """A standalone tensor's vectors in float64, straight from the definition."""
    y = reference.decode(t.codes, t.scales, t.shape[-1], t.role, torch.float64)
    inverse = torch.linalg.inv(t.encode_map.double())
    return (y @ inverse + t.shift.double()[:, None])[:, :, : t.shape[2]]


def assert_same(a: TurboQuantTensor, b: TurboQuantTensor) -> None:
    names, attributes = a.__tensor_flatten__()
    assert (names, attributes) == b.__tensor_flatten__()
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    for name in names:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("role", ROLES)
def test_from_hp_rounds_with_the_feedback_of_its_role(role: Role, rng: torch.Generator) -> None:
    maps = layer_state.maps(2, 64, rng, feedback=True)
    x = randn(rng, 1, 2, 64, 64)
    side = (maps.key, maps.key_shift) if role == "key" else (maps.value, maps.value_shift)
    feedback = maps.key_feedback if role == "key" else maps.value_feedback
    got = TurboQuantTensor.from_hp(x, 3, role, maps)
    assert torch.equal(got.codes, reference.encode(x, *side, 3, role, feedback)[0])
    assert not torch.equal(got.codes, reference.encode(x, *side, 3, role)[0])


@pytest.fixture
def layer(rng: torch.Generator) -> PackedLayer:
    """150 tokens in rows that start at 0 and 5; tiles, sinks and ring all in use."""
    layer = PackedLayer(start=(0, 5))
    layer.append(randn(rng, 2, 2, 150, 64), randn(rng, 2, 2, 150, 64))
    return layer


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_from_hp_stores_what_it_says(rng: torch.Generator, role: Role, bits: int, dim: int) -> None:
    x = randn(rng, 2, 3, 70, dim)
    t = TurboQuantTensor.from_hp(x, bits, role)
    assert t.shape == x.shape
    assert (t.bits, t.role, t.dtype, t.seq_len) == (bits, role, x.dtype, 70)
    vectors = 2 * 3 * 96  # whole tiles
    assert t.codes.nbytes + t.scales.nbytes == t.nbytes_packed == vectors * (dim * bits // 8 + 2)
    assert t.bits_per_value == bits + 16 / dim


def test_three_bits_are_fifty_bytes_per_vector(rng: torch.Generator) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 1, 2, 64, 128), 3)
    assert (t.codes.nbytes + t.scales.nbytes) / (2 * 64) == 50
    assert repr(t) == (
        "TurboQuantTensor(shape=(1, 2, 64, 128), dtype=torch.float32, device=cpu, "
        "bits=3, role='key', bytes_per_vector=50)"
    )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_codec(rng: torch.Generator, role: Role, bits: int) -> None:
    x = randn(rng, 2, 2, 100, 128)
    t = TurboQuantTensor.from_hp(x, bits, role, rotation="dense", seed=3)
    torch.testing.assert_close(t.dequantize().double(), dense64(t), rtol=0, atol=2e-5)
    error = ((t.dequantize() - x).square().mean() / x.square().mean()).item()
    theory = gaussian_mse(even_levels(bits, codebook(bits).step)) if bits < 8 else 1e-3
    assert error < 1.05 * theory, f"{bits} bits: {error:.5f} of the energy lost, expected {theory:.5f}"
    assert t.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("role", ROLES)
def test_any_map_and_shift(rng: torch.Generator, role: Role) -> None:
    maps, x = oblique_maps(rng, 2, 64), randn(rng, 1, 2, 64, 64)
    t = TurboQuantTensor.from_hp(x, 8, role, maps)
    torch.testing.assert_close(t.dequantize().double(), dense64(t), rtol=0, atol=1e-4)
    assert (t.dequantize() - x).norm() < 0.05 * x.norm()
    other = TurboQuantTensor.from_hp(x, 8, role, seed=1)
    wrong = t.replace(decode_map=other.decode_map).dequantize()
    assert (wrong - x).norm() > 0.5 * x.norm()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TurboQuantTensor.from_hp(torch.zeros(4, 32, 64)), r"point x \[B, H, S, D\], H > 0, got"),
        (lambda: TurboQuantTensor.from_hp(torch.zeros(1, 1, 32, 64).int()), r"got torch.int32"),
        (lambda: TurboQuantTensor.from_hp(torch.zeros(1, 1, 32, 64), 5), r"expected bits in .* got 5"),
        (lambda: TurboQuantTensor.from_hp(torch.zeros(1, 1, 32, 64), role="query"), r"expected role in"),
        (lambda: TurboQuantTensor.from_hp(torch.zeros(1, 1, 32, 48)), r"multiple of 32, got 48"),
        (
            lambda: TurboQuantTensor.from_hp(torch.zeros(1, 1, 32, 64), maps=rotation_maps("dense", 2, 64, 0)),
            r"expected maps of 1 KV heads and head_dim 64, got \(2, 64\)",
        ),
        (
            lambda: TurboQuantTensor.from_hp(torch.zeros(1, 1, 32, 64)).replace(length=torch.tensor(3)),
            r"all or none of sinks, recent, length and start",
        ),
    ],
)
def test_construction_errors(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("steps", [(3,), (20, 1), (90,), (60, 70, 1, 9), (190, 1)])
def test_dequantize_of_a_cache_follows_the_geometry(rng: torch.Generator, steps: tuple[int, ...]) -> None:
    start, sinks, window = (0, 2, 33), 4, 32
    layer = PackedLayer(batch=3, start=start, maps=oblique_maps(rng, 2, 64), k_bits=8, v_bits=8)
    total = sum(steps)
    history = [randn(rng, 3, 2, total, 64) for _ in range(2)]
    done = 0
    for q in steps:
        layer.append(*(x[:, :, done : done + q] for x in history))
        done += q
    for t, x in zip(layer.wrap(), history, strict=True):
        dense = t.dequantize()
        assert dense.shape == t.shape == (3, 2, 256, 64)
        for row, first in enumerate(start):
            n = max(0, total - first)
            packed = reference.packed_tokens(n, sinks, window, layer.k_recent.shape[2])
            begin = first + sinks
            exact = [p for p in range(first, total) if not begin <= p < begin + packed]
            assert torch.equal(dense[row][:, exact], x[row][:, exact])
            got, want = dense[row][:, begin : begin + packed], x[row][:, begin : begin + packed]
            if packed:
                assert 0 < (got - want).norm() < 0.05 * want.norm()
            assert not dense[row][:, :first].any()
            assert not dense[row][:, max(first, total) :].any()


def test_dequantize_places_new_tokens_after_the_cache(rng: torch.Generator) -> None:
    layer = PackedLayer(start=(0, 12))
    layer.append(randn(rng, 2, 2, 10, 64), randn(rng, 2, 2, 10, 64))
    new = randn(rng, 2, 2, 7, 64), randn(rng, 2, 2, 7, 64)
    for t, plain, x in zip(layer.wrap(*new), layer.wrap(), new, strict=True):
        assert torch.equal(t.dequantize()[:, :, :10], plain.dequantize()[:, :, :10])
        assert torch.equal(t.dequantize()[0, :, 10:17], x[0])
        assert torch.equal(t.dequantize()[1, :, 12:17], x[1, :, 2:])
        assert not t.dequantize()[1, :, :12].any()
        assert not t.dequantize()[:, :, 17:].any()


def test_dequantize_without_any_packed_tile(rng: torch.Generator) -> None:
    layer = PackedLayer(max_len=0)
    x = randn(rng, 2, 2, 20, 64)
    layer.append(x, x)
    assert torch.equal(layer.wrap()[0].replace(seq_len=20).dequantize(), x)


@pytest.mark.parametrize("copier", [torch.clone, copy.deepcopy, lambda t: t.to(t.device, copy=True)])
def test_copies_are_independent(layer: PackedLayer, copier: Callable[[TurboQuantTensor], TurboQuantTensor]) -> None:
    for t in layer.wrap():
        c = copier(t)
        assert_same(c, t)
        for name in c.__tensor_flatten__()[0]:
            assert getattr(c, name).data_ptr() != getattr(t, name).data_ptr(), name


@pytest.mark.parametrize(
    "view", [torch.Tensor.detach, torch.ops.aten.alias, torch.Tensor.contiguous, torch.Tensor.cpu, lambda t: t[:]]
)
def test_views_share_storage(layer: PackedLayer, view: Callable[[TurboQuantTensor], TurboQuantTensor]) -> None:
    for t in layer.wrap():
        v = view(t)
        assert_same(v, t)
        assert all(getattr(v, n).data_ptr() == getattr(t, n).data_ptr() for n in v.__tensor_flatten__()[0])


def test_to_dtype_changes_the_logical_dtype_and_exact_tokens(layer: PackedLayer, rng: torch.Generator) -> None:
    t = layer.wrap(randn(rng, 2, 2, 3, 64), randn(rng, 2, 2, 3, 64))[0]
    half = t.to(torch.bfloat16)
    assert (half.dtype, half.dequantize().dtype) == (torch.bfloat16, torch.bfloat16)
    assert half.sinks.dtype == half.recent.dtype == half.new.dtype == torch.bfloat16
    assert torch.equal(half.codes, t.codes)
    assert half.encode_map.dtype == torch.float32
    assert half.length.dtype == torch.int64
    assert torch.equal(half.dequantize(), t.dequantize().bfloat16())
    with pytest.raises(NotImplementedError, match=r"floating point, got dtype torch.int32; call .dequantize"):
        t.int()


def test_to_device(layer: PackedLayer) -> None:
    moved = layer.wrap()[0].to("meta")
    assert moved.device.type == "meta"
    assert all(getattr(moved, name).device.type == "meta" for name in moved.__tensor_flatten__()[0])


def test_copy_(rng: torch.Generator) -> None:
    a, b = (TurboQuantTensor.from_hp(randn(rng, 2, 2, 40, 64)) for _ in range(2))
    address = a.codes.data_ptr()
    assert a.copy_(b) is a
    assert_same(a, b)
    assert a.codes.data_ptr() == address
    for other in (a.dequantize(), TurboQuantTensor.from_hp(a.dequantize(), 4), a[:1], a.half()):
        with pytest.raises(ValueError, match="expected copy_ (from a packed tensor like|between equal shapes)"):
            a.copy_(other)


CUTS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x[1],
    lambda x: x[-1],
    lambda x: x[1:],
    lambda x: x[::2],
    lambda x: x[:, 1:2],
    lambda x: x[0][1:],
    lambda x: x[2:1],
    lambda x: x[..., 0:64],
    lambda x: x[1].unsqueeze(0),
    lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
    lambda x: x.index_select(1, torch.tensor([1, 0])),
    lambda x: x.narrow(0, 1, 1),
]
TOKEN_CUTS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x[:, :, 32:],
    lambda x: x[:, :, :64],
    lambda x: x[:, :, 32:64],
    lambda x: x[:1, 1:, 64:],
    lambda x: x[0][:, 32:],
    lambda x: x[:, :, 32:][:, :, 32:],
    lambda x: x[:, :, 96:],
    lambda x: x[:, :, 64:1000],
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("cut", [*CUTS, *TOKEN_CUTS])
def test_cutting_commutes_with_dequantize(
    rng: torch.Generator, cut: Callable[[torch.Tensor], torch.Tensor], role: Role
) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 2, 2, 90, 64), 3, role, oblique_maps(rng, 2, 64))
    piece, want = cut(t), cut(t.dequantize())
    assert isinstance(piece, TurboQuantTensor)
    assert piece.shape == want.shape
    torch.testing.assert_close(piece.dequantize(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_cutting_a_cache_commutes_with_dequantize(
    layer: PackedLayer, rng: torch.Generator, cut: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for t in layer.wrap(randn(rng, 2, 2, 3, 64), randn(rng, 2, 2, 3, 64)):
        torch.testing.assert_close(cut(t).dequantize(), cut(t.dequantize()), rtol=0, atol=1e-5)


def test_slices_are_views(rng: torch.Generator) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 2, 2, 96, 64))
    for piece in (t[1:], t[:, 1:], t[:, :, 32:], t[1]):
        assert piece.codes.untyped_storage().data_ptr() == t.codes.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("op", "match"),
    [
        (lambda t: t + 1, r"does not implement aten.add.Tensor; call .dequantize\(\)"),
        (lambda t: t @ t.mT, r"does not implement aten.transpose.int; call .dequantize\(\)"),
        (lambda t: torch.cat([t, t]), r"does not implement aten.cat.default; call .dequantize\(\)"),
        (lambda t: t.mul_(2), r"does not implement aten.mul_"),
        (lambda t: torch.zeros_like(t), r"does not implement aten.zeros_like"),
        (lambda t: t.reshape(-1), r"does not implement aten.*call .dequantize\(\)"),
        (lambda t: t[..., :32], r"does not implement slice along dim 3 of .* call .dequantize\(\)"),
        (lambda t: t[:, :, ::2], r"does not implement slice along dim 2 of"),
        (lambda t: t[:, :, 0], r"selects along the batch dimension .* slice of length 1"),
        (lambda t: t[0][0], r"selects along the batch dimension .* got dim 0 of \(2, 90, 64\)"),
        (lambda t: t.unsqueeze(0), r"unsqueezes \[H, S, D\] at dim 0 only"),
        (lambda t: t[:, :, 5:], r"multiples of 32 \(got 5:90\)"),
        (lambda t: t[:, :, :33], r"multiples of 32 \(got 0:33\)"),
        (lambda t: t.index_select(2, torch.tensor([0])), r"does not implement index_select along dim 2"),
        (lambda t: t.__setitem__(0, 0.0), r"does not implement aten.*call .dequantize\(\)"),
    ],
)
def test_everything_else_names_the_op_and_the_remedy(
    rng: torch.Generator, op: Callable[[torch.Tensor], object], match: str
) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 2, 2, 90, 64))
    with pytest.raises(NotImplementedError, match=match):
        op(t)


def test_a_cache_cannot_be_cut_along_the_sequence(layer: PackedLayer) -> None:
    with pytest.raises(NotImplementedError, match="sinks and ring sit at fixed positions; crop the cache"):
        layer.wrap()[0][:, :, :64]


def test_torch_save(layer: PackedLayer, rng: torch.Generator) -> None:
    for t in (*layer.wrap(), TurboQuantTensor.from_hp(randn(rng, 1, 2, 40, 96), 2, "value")):
        file = io.BytesIO()
        torch.save({"t": t}, file)
        file.seek(0)
        assert_same(torch.load(file, weights_only=True)["t"], t)


def test_torch_load_refuses_another_layout(rng: torch.Generator) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 1, 2, 40, 64))
    t.layout_version += 1
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    with pytest.raises(ValueError, match="expected codes in layout version 2, got 3"):
        torch.load(file, weights_only=True)


def test_safetensors(layer: PackedLayer, rng: torch.Generator, tmp_path: os.PathLike) -> None:
    k, v = layer.wrap()
    state = {"layer.k": k, "layer.v": v, "prompt.k": TurboQuantTensor.from_hp(randn(rng, 1, 2, 40, 96), 2).bfloat16()}
    tensors, metadata = flatten_tensor_state_dict(state)
    path = f"{tmp_path}/cache.safetensors"
    save_file(tensors, path, metadata)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    loaded, rest = unflatten_tensor_state_dict(tensors, metadata)
    assert not rest
    assert loaded.keys() == state.keys()
    for name, t in state.items():
        assert_same(loaded[name], t)
    newer = {**metadata, "layer.k": metadata["layer.k"].replace('"layout_version": 2', '"layout_version": 3')}
    with pytest.raises(ValueError, match="expected codes in layout version 2, got 3"):
        unflatten_tensor_state_dict(tensors, newer)


def test_stable_hash_depends_on_metadata_alone(rng: torch.Generator) -> None:
    def make(bits: int = 3, tokens: int = 64, role: Role = "key") -> TurboQuantTensor:
        return TurboQuantTensor.from_hp(randn(rng, 1, 2, tokens, 64), bits, role)

    base = make()._stable_hash_for_caching()
    assert make()._stable_hash_for_caching() == base
    others = [
        make(bits=4),
        make(tokens=65),
        make(role="value"),
        make().half(),
        make()[:, :, :32],
        make().replace(window=1),
    ]
    assert len({base, *(t._stable_hash_for_caching() for t in others)}) == 1 + len(others)


def test_stable_hash_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from tq_ao.tensor import TurboQuantTensor as T;"
        "print('hash', T.from_hp(torch.zeros(1, 2, 64, 64))._stable_hash_for_caching())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    here = TurboQuantTensor.from_hp(torch.zeros(1, 2, 64, 64))._stable_hash_for_caching()
    assert f"hash {here}" in done.stdout


def test_every_tile_of_a_partial_tensor_is_whole(rng: torch.Generator) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 1, 1, 33, 64))
    assert t.codes.shape[2] == t.scales.shape[2] == 2
    assert t.scales.shape[3] == TILE
    assert not t.scales[0, 0, 1, 1:].any()


@pytest.mark.parametrize("role", ROLES)
def test_decode_op(rng: torch.Generator, role: Role) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 2, 2, 70, 64), 3, role)
    torch.library.opcheck(ops.decode, (t.codes, t.scales, 64, role))
    assert ops.decode(t.codes, t.scales, 64, role).is_contiguous()
