"""The maps of a layer: what is done to keys, queries, values and outputs around the scalar quantiser.

All maps act on row vectors, one D x D matrix per KV head (queries use the map of their KV head):

    k' = (k - key_shift) @ key          q' = q @ query           key @ query.T = I   so q'.k' = q.(k - key_shift)
    v' = (v - value_shift) @ value      o  = o' @ output + value_shift               value @ output = I

Calibrated maps may come with error feedback: D/2 x D/2 matrices by which the odd dims of k' and v' make up for the
rounding of the even ones (`reference.quantize`), for readers that hear some directions better than others.

An oblivious rotation (TurboQuant, arXiv 2504.19874) is the case key = query = value = output.T = R with
zero shifts; calibrated maps are other matrices in the same four places.  Calibrated read-outs (query, output) may
carry a gain a little above 1 over the inverse, which makes up for the shrinkage of least-squares levels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class LayerMaps:
    """Maps and shifts of one layer, all float32.

    Attributes:
        key, query, value, output: [kv_heads, D, D].
        key_shift, value_shift: [kv_heads, D].
        key_feedback, value_feedback: [kv_heads, D / 2, D / 2], or None for every dim rounded by itself.
    """

    key: torch.Tensor
    query: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    key_shift: torch.Tensor
    value_shift: torch.Tensor
    key_feedback: torch.Tensor | None = None
    value_feedback: torch.Tensor | None = None

    def __post_init__(self) -> None:
        heads, dim = self.key_shift.shape
        wanted = {"shift": (heads, dim), "feedback": (heads, dim // 2, dim // 2)}
        for name, tensor in self.tensors().items():
            want = wanted.get(name.partition("_")[2], (heads, dim, dim))
            if tuple(tensor.shape) != want or tensor.dtype != torch.float32:
                raise ValueError(
                    f"expected map {name!r} to be float32 {want}, got {tensor.dtype} {tuple(tensor.shape)}; "
                    "one D x D matrix (D-vector, D/2 x D/2 feedback) per KV head"
                )

    def to(self, device: torch.device | str) -> "LayerMaps":
        """The same maps on another device."""
        return LayerMaps(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, for saving; without feedback that is None."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as `to` makes them on another device: each for itself."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def hadamard(dim: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix [dim, dim], orthonormal, float64; dim is a power of two."""
    if dim <= 0 or dim & (dim - 1):
        raise ValueError(f"expected a power of two, got {dim}; use kind='dense' for other head dims")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / dim**0.5


@lru_cache(maxsize=512)
def rotations(kind: str, heads: int, dim: int, seed: int) -> torch.Tensor:
    """Random rotations, float32 [heads, dim, dim], a pure function of the arguments on every machine.

    "hadamard" is diag(signs) @ H (fast Johnson-Lindenstrauss, Ailon & Chazelle 2009); "dense" is Haar
    distributed (QR of a Gaussian, Mezzadri math-ph/0609050).  "hadamard" with a dim that is not a power of
    two uses block Hadamards of the largest power-of-two factor mixed by a dense rotation of the blocks.

    Raises:
        ValueError: unknown kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        gaussian = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return (q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)).float()
    if kind != "hadamard":
        raise ValueError(f"expected rotation kind 'hadamard' or 'dense', got {kind!r}")
    signs = torch.randint(0, 2, (heads, dim, 1), generator=generator) * 2.0 - 1.0
    block = dim & -dim
    h = hadamard(block)
    if block != dim:
        blocks = dim // block
        mix, r = torch.linalg.qr(torch.randn(blocks, blocks, generator=generator, dtype=torch.float64))
        h = torch.kron((mix * torch.sign(torch.diagonal(r))).contiguous(), h)
    return (signs * h).float()


def one_by_one(f: Callable[..., torch.Tensor], *stacks: torch.Tensor) -> torch.Tensor:
    """f of matrices [D, D] of each stack [H, D, D], one head at a time, stacked.

    For what factorises by LU: after `torch.set_num_threads`, oneMKL 2024.2 (in torch 2.13) never ends with a batch of
    float64 matrices of 256 dims, and says that a parameter of DLASWP was incorrect.
    """
    return torch.stack([f(*matrices) for matrices in zip(*stacks, strict=True)])


def in_one_part(map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A map that encode can multiply by as one bf16 operand instead of two, and its exact inverse.

    Rounding the entries (by 2**-9 at most) bends the map a little; the read-out undoes the bent one, so no error is
    left.  A matrix of +-c is as good as it is: encode divides by c.

    Args:
        map: [H, D, D], invertible.

    Returns:
        float32 [H, D, D]: the map with entries that bfloat16 has; its inverse (computed in float64).
    """
    size = map.float().abs()
    rounded = map.float() if size.amin() == size.amax() else map.to(torch.bfloat16).float()
    return rounded, one_by_one(torch.linalg.inv, rounded.double()).float()


@lru_cache(maxsize=64)
def rotation_maps(kind: str, heads: int, dim: int, seed: int) -> LayerMaps:
    """Plain TurboQuant maps of one layer: the same rotation for K and V, zero shifts."""
    with torch.device("cpu"), torch.inference_mode(False):  # kept, whatever the mode of who asks first
        r, inverse = in_one_part(rotations(kind, heads, dim, seed))
        zero = torch.zeros(heads, dim, dtype=torch.float32)
    return LayerMaps(key=r, query=inverse.mT.contiguous(), value=r, output=inverse, key_shift=zero, value_shift=zero)


class MapSource:
    """Where a model's layers get their maps: calibrated ones if given, else random rotations.

    Maps are built once per (layer, device) and shared by every cache of the model.

    Args:
        kind, seed: of the random rotations (see `rotations`); layer i uses a stream of its own.
        calibrated: layer index -> LayerMaps, or None.
    """

    def __init__(self, kind: str, seed: int, calibrated: Mapping[int, LayerMaps] | None = None) -> None:
        self.kind, self.seed = kind, seed
        self.calibrated = dict(calibrated or {})
        self._drawn: dict[tuple[int, int, int], LayerMaps] = {}
        self._built: dict[tuple[int, torch.device], LayerMaps] = {}

    def draw(self, layer: int, heads: int, dim: int) -> LayerMaps:
        """Maps of one layer where they were made; random ones are drawn now, which a compiled program cannot do."""
        if layer in self.calibrated:
            return self.calibrated[layer]
        key = layer, heads, dim
        if key not in self._drawn:
            self._drawn[key] = rotation_maps(self.kind, heads, dim, self.seed * 1_000_003 + layer)
        return self._drawn[key]

    def __call__(self, layer: int, heads: int, dim: int, device: torch.device) -> LayerMaps:
        """Maps of one layer on a device.

        Raises:
            ValueError: calibrated maps of another shape than the layer's keys.
        """
        found = self._built.get((layer, device))
        if found is None:
            found = self._built[layer, device] = self.draw(layer, heads, dim).to(device)
        if found.key.shape != (heads, dim, dim):
            raise ValueError(
                f"layer {layer}: expected maps for {heads} KV heads of dim {dim}, got {tuple(found.key.shape)}; "
                "this schedule was calibrated for another model"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Pickles go without what is made from the rest."""
        return self.__dict__ | {"_drawn": {}, "_built": {}}

    def __deepcopy__(self, memo: dict) -> "MapSource":
        return self
