"""TurboQuantTensor at the edges: empty inputs, code widths that are no ints, and where a packed tensor does not fit."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from tq_ao.attention import ATTENTION_NAME
from tq_ao.codebook import BITS, ROLES, Role
from tq_ao.packing import tile_bytes
from tq_ao.tensor import TurboQuantTensor


def randn(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng)


@pytest.mark.parametrize("shape", [(2, 3, 0, 64), (0, 3, 70, 64), (0, 3, 0, 96)])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
def test_an_empty_tensor_packs_to_an_empty_one(bits: int, role: Role, shape: tuple[int, ...]) -> None:
    t = TurboQuantTensor.from_hp(torch.empty(shape, dtype=torch.bfloat16), bits, role)
    assert (t.shape, t.bits, t.nbytes_packed, t.bits_per_value) == (shape, bits, 0, bits + 16 / shape[3])
    assert t.codes.shape == (*shape[:2], -(-shape[2] // 32), tile_bytes(bits, shape[3]))
    assert (t.dequantize().shape, t.dequantize().dtype) == (shape, torch.bfloat16)


@pytest.mark.parametrize("bits", BITS)
def test_attention_over_an_empty_batch_or_no_keys(bits: int, rng: torch.Generator) -> None:
    for batch, tokens in ((0, 70), (2, 0)):
        x = randn(rng, batch, 3, tokens, 64)
        q = randn(rng, batch, 3, 1, 64)
        k, v = (TurboQuantTensor.from_hp(x, bits, role) for role in ROLES)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), torch.zeros_like(q))


@pytest.mark.parametrize("bits", BITS)
def test_a_cut_to_nothing_dequantizes(bits: int, rng: torch.Generator) -> None:
    t = TurboQuantTensor.from_hp(randn(rng, 2, 2, 70, 64), bits)
    for piece, shape in ((t[2:], (0, 2, 70, 64)), (t[:, :, :0], (2, 2, 0, 64))):
        assert piece.dequantize().shape == shape


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, 0, 70, 64), r"expected floating point x \[B, H, S, D\], H > 0, got torch.float32 \(2, 0, 70, 64\)"),
        ((2, 3, 70, 0), "expected head_dim to be a positive multiple of 32, got 0"),
    ],
)
def test_heads_and_head_dim_are_not_zero(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TurboQuantTensor.from_hp(torch.empty(shape))


@pytest.mark.parametrize("bits", [3.0, True, "3", None, 5, torch.tensor(3)])
def test_bits_are_an_int(bits: object, rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"^expected bits in \(1, 2, 3, 4, 8\), an int, got .*; choose one") as error:
        TurboQuantTensor.from_hp(randn(rng, 1, 2, 40, 64), bits)
    assert repr(bits) in str(error.value)
    assert "\n" not in str(error.value)


def test_copy_into_a_dense_tensor_says_dequantize(rng: torch.Generator) -> None:
    dense = randn(rng, 2, 2, 40, 64)
    packed = TurboQuantTensor.from_hp(dense)
    with pytest.raises(NotImplementedError, match=r"\(2, 2, 40, 64\) cannot be copied into .* \.dequantize\(\) first"):
        torch.empty_like(dense).copy_(packed)


@pytest.mark.parametrize("forward", [eager_attention_forward, sdpa_attention_forward])
@pytest.mark.parametrize("groups", [1, 2])
def test_other_attention_implementations_name_the_right_one(
    forward: Callable[..., object], groups: int, rng: torch.Generator
) -> None:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    k, v = (TurboQuantTensor.from_hp(randn(rng, 2, 2, 40, 64), 3, role) for role in ROLES)
    q, mask = randn(rng, 2, 2 * groups, 1, 64), torch.zeros(2, 1, 1, 40)
    advice = f"; in a model: a packed cache needs the attention implementation '{ATTENTION_NAME}', which quantize_kv_ "
    with pytest.raises((NotImplementedError, ValueError), match=advice):
        forward(module, q, k, v, mask, scaling=0.125, dropout=0.0)
