"""The operands of encode against plain torch: in the interpreter without a GPU, on it with one."""

import layer_state
import pytest
import torch

from tq_ao import reference
from tq_ao.codebook import ROLES
from tq_ao.rotation import rotation_maps, rotations

operands = pytest.importorskip("tq_ao.kernels.operands")  # Triton exists on Linux only

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sections(x: torch.Tensor, dim: int, feedback: bool) -> dict[str, torch.Tensor]:
    """What a kernel finds at the offsets that it is told."""
    padded = operands.padded_dim(dim)
    at = [0, operands.feedback_at(padded), operands.shift_at(padded, feedback), operands.unit_at(padded, feedback)]
    assert all(offset % 16 == 0 for offset in (*at, x.shape[1]))  # 32 bytes, which copies of 16 bytes a lane rest on
    map, square, minus, last = x.cpu().tensor_split(at[1:], dim=1)
    assert not last.contiguous().view(torch.int32)[:, 2:].any()
    return {
        "map": map.unflatten(1, (padded, padded)), "feedback": square, "minus": minus.contiguous().view(torch.float32),
        "unit": last.contiguous().view(torch.float32)[:, 0], "remainder": last.contiguous().view(torch.int32)[:, 1],
    }  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "one part", "two parts", "both"])
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_operands_equal_those_of_plain_torch(
    dim: int, kind: str, feedback: bool, role: str, rng: torch.Generator, seed: int
) -> None:
    """Also of heads of which one has a remainder and the other none."""
    maps = layer_state.maps(2, dim, rng, feedback).to(DEVICE)
    given = {"hadamard": rotations("hadamard", 2, dim, seed), "one part": rotation_maps("dense", 2, dim, seed).key}
    map = given.get(kind, maps.key.cpu()).clone()
    if kind == "both":
        map[1] = map[1].bfloat16().float()
    got = operands.prepare(map.to(DEVICE), maps.key_shift, role, maps.key_feedback)
    want = reference.prepare(map, maps.key_shift.cpu(), role, None if not feedback else maps.key_feedback.cpu())
    assert got.shape == want.shape == (2, operands.size(operands.padded_dim(dim), feedback))
    assert got.dtype == want.dtype == torch.int16 and got.is_contiguous() and want.is_contiguous()
    got, want = (sections(x, dim, feedback) for x in (got, want))
    assert torch.allclose(got.pop("minus"), want.pop("minus"), rtol=1e-5, atol=1e-5 / want["unit"].min().item())
    assert all(torch.equal(got[name], want[name]) for name in want)
    alike = kind == "hadamard" and dim != 96
    first = kind in ("two parts", "both") or (kind == "hadamard" and dim == 96)
    assert want["remainder"].tolist() == [first, first and kind != "both"]
    assert (want["unit"] != 1).tolist() == [alike, alike]
