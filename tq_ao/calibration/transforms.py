"""Closed-form maps that put the quantiser's noise where the model does not look.

A key k' = A k, rotated and quantised with relative noise, has an error of covariance ~ |k'|**2 M^-1 in k with
M = A^T A, so the expected squared score error is proportional to tr(M^-1 Sq) tr(M Sk).  It is least at the
geometric mean of Sk^-1 and Sq,

    M = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2,       least value  (tr (Sk^1/2 Sq Sk^1/2)^1/2)**2,

against tr Sq tr Sk for a plain rotation.  Values are the same problem with Sv and the second moment of what
multiplies them: W_o^T W_o, or the loss gradient of the attention output.
"""

import torch

from tq_ao.calibration.statistics import LayerStatistics
from tq_ao.rotation import LayerMaps, in_one_part, rotations

RIDGE = 1e-2
KEY_VARIANTS = ("plain", "tokens", "attention", "attention-centred", "fisher", "fisher-centred")
KEY_CHOICES = ("plain", "attention", "attention-centred", "fisher-centred")
VALUE_VARIANTS = ("plain", "attention", "attention-centred", "fisher-centred", "fisher-metric-centred")
VALUE_CHOICES = ("plain", "attention-centred", "fisher-centred")


def matrix_power(s: torch.Tensor, exponent: float) -> torch.Tensor:
    """Power of symmetric positive matrices [..., D, D]."""
    values, vectors = torch.linalg.eigh(s)
    floor = values.amax(-1, keepdim=True).clamp_min(1e-300) * 1e-14
    return (vectors * values.clamp_min(floor).pow(exponent).unsqueeze(-2)) @ vectors.mT


def regularized(s: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """s plus `ridge` times its mean eigenvalue on the diagonal, scaled to mean eigenvalue 1."""
    mean = s.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-300)
    return s / mean + ridge * torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)


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
    return a / torch.exp(torch.linalg.slogdet(a)[1] / a.shape[-1])[:, None, None]


def expected_error(stored: torch.Tensor, reader: torch.Tensor, a: torch.Tensor | None = None) -> torch.Tensor:
    """tr(M^-1 reader) tr(M stored) with M = A A (identity if None): [H]."""
    if a is None:
        return _trace(stored.double()) * _trace(reader.double())
    inverse = torch.linalg.inv(a)
    return _trace(a @ stored.double() @ a) * _trace(inverse @ reader.double() @ inverse)


def _trace(s: torch.Tensor) -> torch.Tensor:
    return s.diagonal(dim1=-2, dim2=-1).sum(-1)


def key_maps(
    statistics: LayerStatistics, variant: str, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(key, query, key_shift) of a variant in KEY_VARIANTS, float32; rotation is [H, D, D].

    Raises:
        ValueError: unknown variant, or one whose statistics were not collected.
    """
    if variant == "plain":
        key, inverse = in_one_part(rotation)
        return key, inverse.mT.contiguous(), rotation.new_zeros(rotation.shape[:2])
    weighting, _, centred = variant.partition("-")
    k, q = _moments(statistics, "k", weighting, variant), _moments(statistics, "q", weighting, variant)
    a = balance(k.covariance(bool(centred)), q.covariance(False))
    shift = k.mean().float() if centred else rotation.new_zeros(rotation.shape[:2])
    key, inverse = in_one_part(a @ rotation.double().cpu())
    return key.to(rotation.device), inverse.mT.contiguous().to(rotation.device), shift.to(rotation.device)


def value_maps(
    statistics: LayerStatistics, variant: str, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(value, output, value_shift) of a variant in VALUE_VARIANTS, float32; rotation is [H, D, D].

    "attention*" read through W_o^T W_o; "fisher-metric-centred" pairs attention-weighted values with the gradient's
    second moment; "fisher-centred" weights the values by the Fisher information too.

    Raises:
        ValueError: unknown variant, or one whose statistics were not collected.
    """
    if variant == "plain":
        return *in_one_part(rotation), rotation.new_zeros(rotation.shape[:2])
    centred = variant.endswith("centred")
    v = _moments(statistics, "v", "fisher" if variant == "fisher-centred" else "attention", variant)
    if variant.startswith("fisher"):
        reader = _moments(statistics, "g", "fisher", variant).covariance(False)
    elif statistics.readout is not None:
        reader = statistics.readout
    else:
        raise ValueError(
            f"value maps {variant!r} need W_o^T W_o, which was not found in this model; use 'fisher-centred'"
        )
    a = balance(v.covariance(centred), reader)
    shift = v.mean().float() if centred else rotation.new_zeros(rotation.shape[:2])
    value, output = in_one_part(a @ rotation.double().cpu())
    return value.to(rotation.device), output.to(rotation.device), shift.to(rotation.device)


def _moments(statistics: LayerStatistics, what: str, weighting: str, variant: str):  # type: ignore[no-untyped-def]
    if (what, weighting) not in statistics.moments:
        have = sorted({w for _, w in statistics.moments})
        raise ValueError(f"maps {variant!r} need {weighting!r} statistics of {what!r}; collected: {have}")
    return statistics.moments[what, weighting]


def layer_maps(
    statistics: LayerStatistics, key_variant: str, value_variant: str, seed: int, kind: str = "hadamard"
) -> LayerMaps:
    """Calibrated maps of a layer, followed by the same random rotation plain TurboQuant would use."""
    some = next(iter(statistics.moments.values()))
    rotation = rotations(kind, *some.first.shape, seed).to(some.first.device)
    key, query, key_shift = key_maps(statistics, key_variant, rotation)
    value, output, value_shift = value_maps(statistics, value_variant, rotation)
    return LayerMaps(
        key=key.contiguous(), query=query.contiguous(), value=value.contiguous(), output=output.contiguous(),
        key_shift=key_shift.contiguous(), value_shift=value_shift.contiguous(),
    )  # fmt: skip
