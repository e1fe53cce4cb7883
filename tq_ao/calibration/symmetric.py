"""Symmetric positive matrices as the map makers take them: powers, and a ridge against few samples."""

import torch

RIDGE = 1e-2


def matrix_power(s: torch.Tensor, exponent: float) -> torch.Tensor:
    """Power of symmetric positive matrices [..., D, D]."""
    values, vectors = torch.linalg.eigh(s)
    floor = values.amax(-1, keepdim=True).clamp_min(1e-300) * 1e-14
    return (vectors * values.clamp_min(floor).pow(exponent).unsqueeze(-2)) @ vectors.mT


def regularized(s: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """s plus `ridge` times its mean eigenvalue on the diagonal, scaled to mean eigenvalue 1."""
    mean = s.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-300)
    return s / mean + ridge * torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
