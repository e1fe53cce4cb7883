"""How well a cheap sensitivity predicts the measured one: rank correlation over layers."""

import torch

from tq_ao.calibration.sensitivity import Table


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two vectors (ties get their mean rank)."""
    ra, rb = (_ranks(x.double()) for x in (a, b))
    ra, rb = ra - ra.mean(), rb - rb.mean()
    norm = ra.norm() * rb.norm()
    return float((ra @ rb) / norm) if norm > 0 else float("nan")


def _ranks(x: torch.Tensor) -> torch.Tensor:
    less = (x[None, :] < x[:, None]).sum(1)
    same = (x[None, :] == x[:, None]).sum(1)
    return less.double() + (same.double() - 1) / 2


def correlations(table: Table, truth: Table) -> dict[str, float]:
    """Rank correlation of two tables over their common entries: "key", "value" and "both".

    Each at a fixed width, averaged over widths; "both" ranks keys and values of one width together, which is
    what allocating bits between them needs.
    """
    places = set(table) & set(truth)
    found: dict[str, list[float]] = {"key": [], "value": [], "both": []}
    for b in sorted({width for _, _, width in places}):
        for name, sides in (("key", ("key",)), ("value", ("value",)), ("both", ("key", "value"))):
            here = sorted(p for p in places if p[2] == b and p[1] in sides)
            a, c = (torch.tensor([t[p] for p in here]) for t in (table, truth))
            found[name].append(spearman(a, c))
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}
