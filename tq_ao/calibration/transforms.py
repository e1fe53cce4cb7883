"""Closed-form maps that put the quantiser's noise where the model does not look.

A key k' = A k, rotated and quantised with relative noise, has an error of covariance ~ |k'|**2 M^-1 in k with
M = A^T A, so the expected squared score error is proportional to tr(M^-1 Sq) tr(M Sk).  It is least at the
geometric mean of Sk^-1 and Sq,

    M = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2,       least value  (tr (Sk^1/2 Sq Sk^1/2)^1/2)**2,

against tr Sq tr Sk for a plain rotation.  Values are the same problem with Sv and the second moment of what
multiplies them: W_o^T W_o, or the loss gradient of the attention output.  `feedback` goes on from here.
"""

from typing import NamedTuple

import torch

from tq_ao.calibration.feedback import fed_back
from tq_ao.calibration.statistics import LayerStatistics, Moments
from tq_ao.calibration.symmetric import RIDGE, matrix_power, regularized
from tq_ao.rotation import LayerMaps, in_one_part, one_by_one, rotations

KEY_VARIANTS = (
    "plain", "tokens", "attention", "attention-centred", "fisher", "fisher-centred", "attention-feedback",
    "fisher-feedback",
)  # fmt: skip
KEY_CHOICES = ("plain", "attention-centred", "fisher-centred", "attention-feedback", "fisher-feedback")
VALUE_VARIANTS = (
    "plain", "attention", "attention-centred", "fisher-centred", "fisher-metric-centred", "attention-feedback",
    "fisher-feedback",
)  # fmt: skip
VALUE_CHOICES = ("plain", "attention-centred", "fisher-centred", "attention-feedback", "fisher-feedback")


class Side(NamedTuple):
    """Maps of keys or of values: `decode` is LayerMaps.query or .output."""

    encode: torch.Tensor
    decode: torch.Tensor
    shift: torch.Tensor
    feedback: torch.Tensor | None = None


def balance(stored: torch.Tensor, reader: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The symmetric A with A A = M minimising tr(M^-1 reader) tr(M stored).

    Args:
        stored, reader: second moments [H, D, D] of the vectors quantised and of what multiplies them.
        ridge: regulariser of both, relative to their mean eigenvalue.

    Returns:
        float64 [H, D, D] on the CPU (small eigenproblems are slow on a GPU), determinant 1.
    """
    stored, reader = regularized(stored.double().cpu(), ridge), regularized(reader.double().cpu(), ridge)
    half, inverse = matrix_power(stored, 0.5), matrix_power(stored, -0.5)
    m = inverse @ matrix_power(half @ reader @ half, 0.5) @ inverse
    a = matrix_power((m + m.mT) / 2, 0.5)
    return a / torch.exp(one_by_one(torch.logdet, a) / a.shape[-1])[:, None, None]


def key_maps(statistics: LayerStatistics, variant: str, rotation: torch.Tensor) -> Side:
    """Maps of a variant in KEY_VARIANTS, float32; rotation is [H, D, D].

    Raises:
        ValueError: unknown variant, or one whose statistics were not collected.
    """
    if variant not in KEY_VARIANTS:
        raise ValueError(f"expected a variant of key maps in {KEY_VARIANTS}, got {variant!r}")
    if variant == "plain":
        key, inverse = in_one_part(rotation)
        return Side(key, inverse.mT.contiguous(), rotation.new_zeros(rotation.shape[:2]))
    weighting, _, kind = variant.partition("-")
    k, q = _moments(statistics, "k", weighting, variant), _moments(statistics, "q", weighting, variant)
    side = _side(k, q.covariance(False), kind, rotation)
    return side._replace(decode=side.decode.mT.contiguous())


def value_maps(statistics: LayerStatistics, variant: str, rotation: torch.Tensor) -> Side:
    """Maps of a variant in VALUE_VARIANTS, float32; rotation is [H, D, D].

    "attention*" read through W_o^T W_o; "fisher-metric-centred" pairs attention-weighted values with the gradient's
    second moment; "fisher-centred" and "fisher-feedback" weight the values by the Fisher information too.

    Raises:
        ValueError: unknown variant, or one whose statistics were not collected.
    """
    if variant not in VALUE_VARIANTS:
        raise ValueError(f"expected a variant of value maps in {VALUE_VARIANTS}, got {variant!r}")
    if variant == "plain":
        return Side(*in_one_part(rotation), rotation.new_zeros(rotation.shape[:2]))
    weighting, _, kind = variant.partition("-")
    v = _moments(statistics, "v", "attention" if kind == "metric-centred" else weighting, variant)
    if weighting == "fisher":
        reader = _moments(statistics, "g", "fisher", variant).covariance(False)
    elif statistics.readout is not None:
        reader = statistics.readout
    else:
        raise ValueError(
            f"value maps {variant!r} need W_o^T W_o, which was not found in this model; use 'fisher-centred'"
        )
    return _side(v, reader, kind, rotation)


def _side(stored: Moments, reader: torch.Tensor, kind: str, rotation: torch.Tensor) -> Side:
    """Maps for vectors with `stored` moments; kind is "" (not centred), "[metric-]centred", or "feedback" (centred)."""
    feedback = None
    if kind == "feedback":
        a, feedback = fed_back(stored.covariance(True), reader)
        feedback = feedback.to(rotation.device)
    else:
        a = balance(stored.covariance(kind != ""), reader) @ rotation.double().cpu()
    map, inverse = (m.to(rotation.device) for m in in_one_part(a))
    shift = stored.mean().float() if kind else rotation.new_zeros(rotation.shape[:2])
    return Side(map, inverse, shift.to(rotation.device), feedback)


def _moments(statistics: LayerStatistics, what: str, weighting: str, variant: str) -> Moments:
    if (what, weighting) not in statistics.moments:
        have = sorted({w for _, w in statistics.moments})
        raise ValueError(f"maps {variant!r} need {weighting!r} statistics of {what!r}; collected: {have}")
    return statistics.moments[what, weighting]


def joined(key: Side, value: Side) -> LayerMaps:
    """A layer's maps from those of its sides."""
    return LayerMaps(
        key=key.encode.contiguous(), query=key.decode.contiguous(), key_shift=key.shift.contiguous(),
        value=value.encode.contiguous(), output=value.decode.contiguous(), value_shift=value.shift.contiguous(),
        key_feedback=key.feedback, value_feedback=value.feedback,
    )  # fmt: skip


def layer_maps(
    statistics: LayerStatistics, key_variant: str, value_variant: str, seed: int, kind: str = "hadamard"
) -> LayerMaps:
    """Calibrated maps of a layer, followed by the same random rotation plain TurboQuant would use.

    Maps with feedback mix each half by a Hadamard matrix of its own instead (`feedback.fed_back`).
    """
    some = next(iter(statistics.moments.values()))
    rotation = rotations(kind, *some.first.shape, seed).to(some.first.device)
    return joined(key_maps(statistics, key_variant, rotation), value_maps(statistics, value_variant, rotation))
