"""Linear decoders fitted to what the reader computes, in place of the exact inverse of the encoder's map.

A least-squares scalar quantiser shrinks: E[level] = (1 - mse) y.  For one vector that is right; a sum of many
attended values averages the noise away and keeps the bias, so the best linear read-out of the *sum* differs from
the inverse map.  With Y_i = sum_j p_ij y_j the packed sum in mapped space and O_i the same sum of exact, shifted
values, `output` = argmin sum_i |Y_i output - O_i|**2, ridge-regularised towards the inverse map.  Keys: `query`
= the transpose of the least-squares decoder of k from its levels, weighted by attention.  Fitted maps belong to
one bit width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from tq_ao.calibration.sensitivity import bar, device_of
from tq_ao.calibration.statistics import packed_rows, pair_weights
from tq_ao.measure.capture import Trace, trace
from tq_ao.measure.simulate import LayerPlan
from tq_ao.reference import rounded
from tq_ao.rotation import LayerMaps, one_by_one

RIDGE = 1e-3


def refit(
    model: torch.nn.Module,
    windows: torch.Tensor,
    plans: Mapping[int, LayerPlan],
    *,
    window: int,
    sinks: int,
    sides: Sequence[str] = ("value",),
    ridge: float = RIDGE,
    progress: bool = False,
) -> dict[int, LayerMaps]:
    """The plans' maps with `output` ("value") and `query` ("key") refitted to the plans' bit widths.

    Args:
        windows: int64 [n, N] calibration text.
        ridge: weight of the inverse map, relative to the mean second moment of the levels.
    """
    grams: dict[tuple[int, str], torch.Tensor] = {}
    crosses: dict[tuple[int, str], torch.Tensor] = {}
    for ids in bar(windows.split(1), "decoders", progress):
        with torch.no_grad():
            traces = trace(model, ids.to(device_of(model)), gradient=False)
            for i, plan in plans.items():
                t = traces.pop(i)
                for side in sides:
                    gram, cross = (_key_normal if side == "key" else _value_normal)(t, plan, window, sinks)
                    grams[i, side] = grams.get((i, side), 0) + gram
                    crosses[i, side] = crosses.get((i, side), 0) + cross
    fitted = {}
    for i, plan in plans.items():
        maps = plan.maps
        if "value" in sides:
            maps = replace(maps, output=_solve(grams[i, "value"], crosses[i, "value"], maps.output, ridge))
        if "key" in sides:
            query = _solve(grams[i, "key"], crosses[i, "key"], maps.query.mT, ridge).mT
            maps = replace(maps, query=query.contiguous())
        fitted[i] = maps
    return fitted


def _solve(gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge regression towards `prior` [H, D, D]."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weight = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    return one_by_one(torch.linalg.solve, gram + weight, cross + weight @ prior.double()).float().contiguous()


def _levels(
    x: torch.Tensor, map: torch.Tensor, shift: torch.Tensor, bits: int, feedback: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - shift) and its dequantised levels in mapped space."""
    shifted = x.float() - shift[:, None]
    return shifted, rounded(shifted @ map, bits, feedback)


def _value_normal(t: Trace, plan: LayerPlan, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    exact, levels = _levels(t.call.v, plan.maps.value, plan.maps.value_shift, plan.v_bits, plan.maps.value_feedback)
    zero = torch.zeros_like(plan.maps.value, dtype=torch.float64)
    gram, cross = zero, zero
    for _, _, _, read in packed_rows(t.call, window, sinks):
        p, columns = read.flatten(2, 3), read.shape[-1]
        y, o = p @ levels[:, :, :columns], p @ exact[:, :, :columns]
        gram = gram + (y.mT @ y).double().sum(0)
        cross = cross + (y.mT @ o).double().sum(0)
    return gram, cross


def _key_normal(t: Trace, plan: LayerPlan, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = pair_weights(Trace(t.call, t.out), window, sinks).k_attention.unsqueeze(-1)
    exact, levels = _levels(t.call.k, plan.maps.key, plan.maps.key_shift, plan.k_bits, plan.maps.key_feedback)
    return (levels.mT @ (weight * levels)).double().sum(0), (levels.mT @ (weight * exact)).double().sum(0)
