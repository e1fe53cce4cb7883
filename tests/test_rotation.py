import subprocess
import sys

import pytest
import torch

from tq_ao.rotation import LayerMaps, hadamard, in_one_part, rotation_maps, rotations


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("kind", ["hadamard", "dense"])
def test_rotations_are_orthogonal_and_a_function_of_the_seed(kind: str, dim: int, seed: int) -> None:
    r = rotations(kind, 3, dim, seed)
    assert r.dtype == torch.float32
    assert torch.allclose(r.double() @ r.double().mT, torch.eye(dim, dtype=torch.float64).expand(3, -1, -1), atol=1e-6)
    rotations.cache_clear()
    assert torch.equal(rotations(kind, 3, dim, seed), r)
    assert not torch.equal(rotations(kind, 3, dim, seed + 1), r)
    assert not torch.equal(r[0], r[1])


def test_rotation_does_not_depend_on_the_global_generator(seed: int) -> None:
    rotations.cache_clear()
    torch.manual_seed(1)
    a = rotations("dense", 1, 64, seed)
    rotations.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(rotations("dense", 1, 64, seed), a)


def test_rotated_coordinates_of_a_spike_are_spread(seed: int) -> None:
    spike = torch.zeros(128)
    spike[7] = 1
    assert (spike @ rotations("hadamard", 1, 128, seed)[0]).abs().max() == pytest.approx(128**-0.5, rel=1e-5)


def test_maps_keep_scores_and_outputs(seed: int, rng: torch.Generator) -> None:
    maps = rotation_maps("dense", 2, 64, seed)
    q, k, v = (torch.randn(2, 5, 64, generator=rng) for _ in range(3))
    assert torch.allclose((q @ maps.query) @ (k @ maps.key).mT, q @ k.mT, atol=1e-4)
    assert torch.allclose((v @ maps.value) @ maps.output, v, atol=1e-5)


def test_a_map_in_one_part_has_bfloat16_entries_and_its_own_inverse(rng: torch.Generator) -> None:
    stretch = torch.exp(torch.randn(3, 96, 1, generator=rng, dtype=torch.float64))
    map, inverse = in_one_part(stretch * torch.randn(3, 96, 96, generator=rng, dtype=torch.float64))
    assert torch.equal(map, map.bfloat16().float())
    eye = torch.eye(96, dtype=torch.float64).expand(3, -1, -1)
    # Rounding the inverse to float32 is all that is lost; how much of a random map that is depends on its condition.
    lost = map.abs().double() @ inverse.abs().double() * 2**-24
    assert ((map.double() @ inverse.double() - eye).abs() <= 1.1 * lost + 1e-7).all()
    plain, back = in_one_part(rotations("hadamard", 2, 128, 5))
    assert torch.equal(plain, rotations("hadamard", 2, 128, 5))
    torch.testing.assert_close(back, plain.mT)


def test_errors() -> None:
    with pytest.raises(ValueError, match="power of two, got 96"):
        hadamard(96)
    with pytest.raises(ValueError, match="expected rotation kind"):
        rotations("givens", 1, 64, 0)
    good = rotation_maps("dense", 2, 64, 0).tensors()
    with pytest.raises(ValueError, match=r"map 'query' to be float32 \(2, 64, 64\)"):
        LayerMaps(**{**good, "query": good["query"][:1]})
    with pytest.raises(ValueError, match=r"map 'value_feedback' to be float32 \(2, 32, 32\), got .* \(2, 64, 64\)"):
        LayerMaps(**good, value_feedback=good["value"])
    with pytest.raises(ValueError, match=r"map 'key_shift'.*got torch.float64|map 'key' to be float32"):
        LayerMaps(**{**good, "key": good["key"].double()})


def test_dense_maps_of_256_dims_are_made_in_threads_that_a_caller_sets() -> None:
    """In a process of its own: a batched LU hangs there."""
    program = "import torch, tq_ao.rotation as r; torch.set_num_threads(2); r.rotation_maps('dense', 2, 256, 0)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
