"""Undo the quantiser's shrinkage on the reader's side.

With the least-squares scale the levels of a vector are shorter than the vector: E[levels | y] = (1 - mse) y.
That is best for one vector, but attention reads sums: errors of many values average out while the shrinkage
stays, and shrunk keys flatten every softmax.  Multiplying `output` by 1 / (1 - mse) makes the sum unbiased;
keys, where single scores matter too, do best about half way.  With error feedback half of the dims make up for the
shrinkage of the others, so either correction is halved.  The factors live in the maps, so reading costs
nothing more; they belong to a bit width, so they are applied when the bits are chosen.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from tq_ao.codebook import Role, codebook, even_levels, gaussian_mse
from tq_ao.config import EXACT
from tq_ao.rotation import LayerMaps

SHARE: dict[Role, float] = {"key": 0.5, "value": 1.0}  # of the way from least squares to unbiased


@lru_cache
def gain(bits: int, role: Role, share: float | None = None) -> float:
    """Factor for the reader of `bits`-bit levels; 1 at 8 and 16 bits, where nothing shrinks.

    Args:
        share: of the way from least squares (0) to unbiased (1); default SHARE[role].
    """
    if bits in (8, EXACT):
        return 1.0
    mse = gaussian_mse(even_levels(bits, codebook(bits).step))
    return 1 + (SHARE[role] if share is None else share) * (1 / (1 - mse) - 1)


def compensated(maps: LayerMaps, k_bits: int, v_bits: int) -> LayerMaps:
    """The maps with `query` and `output` scaled by the gains of their bit widths."""
    k, v = _share("key", maps.key_feedback), _share("value", maps.value_feedback)
    return replace(maps, query=maps.query * gain(k_bits, "key", k), output=maps.output * gain(v_bits, "value", v))


def _share(role: Role, feedback: torch.Tensor | None) -> float:
    return SHARE[role] if feedback is None else SHARE[role] / 2
