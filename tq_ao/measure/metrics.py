"""Next-token quality of a changed model against the exact one: KL, perplexity ratio, top-1 agreement.

Standard errors are over chunks of text, not tokens: errors of neighbouring tokens are correlated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CHUNK = 512
SKIP = 64


@dataclass(frozen=True)
class Metrics:
    """Averages over the evaluated positions.

    Attributes:
        kl: mean KL(exact || changed) of the next-token distribution, in nats; kl_stderr over chunks.
        ppl, ppl_exact: perplexities on the text.
        ppl_ratio: their quotient; ppl_ratio_stderr over chunks.
        top1: share of positions where both name the same most likely token.
        tokens, chunks: how many of each went in.
    """

    kl: float
    kl_stderr: float
    ppl: float
    ppl_exact: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    top1: float
    tokens: int
    chunks: int


@dataclass(frozen=True)
class TokenScores:
    """Per-position results, float32 [B, n], at `positions` [n]; `nll*` are NaN where there is no next token."""

    positions: torch.Tensor
    kl: torch.Tensor
    nll: torch.Tensor
    nll_exact: torch.Tensor
    top1: torch.Tensor


def score(exact: torch.Tensor, changed: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> TokenScores:
    """Compare logits at some positions.

    Args:
        exact, changed: logits [B, n, V].
        ids: the windows, int64 [B, N].
        positions: int64 [n], ascending positions the logits belong to.
    """
    positions = positions.to(exact.device)
    last = positions == ids.shape[1] - 1
    labels = ids.to(exact.device)[:, (positions + 1).clamp_max(ids.shape[1] - 1)]
    parts: list[list[torch.Tensor]] = [[], [], [], []]
    for a, b, label in zip(exact.split(128, 1), changed.split(128, 1), labels.split(128, 1), strict=True):
        p, q = torch.log_softmax(a.float(), -1), torch.log_softmax(b.to(a.device).float(), -1)
        parts[0].append((p.exp() * (p - q)).sum(-1))
        parts[1].append(-q.gather(-1, label[..., None])[..., 0])
        parts[2].append(-p.gather(-1, label[..., None])[..., 0])
        parts[3].append((p.argmax(-1) == q.argmax(-1)).float())
    kl, nll, nll_exact, top1 = (torch.cat(part, 1) for part in parts)
    nll, nll_exact = (x.masked_fill(last, torch.nan) for x in (nll, nll_exact))
    return TokenScores(positions.cpu(), kl.cpu(), nll.cpu(), nll_exact.cpu(), top1.cpu())


def joined(pieces: Sequence[TokenScores]) -> TokenScores:
    """The scores of the same windows at further and further positions, as one."""
    fields = zip(*((s.positions, s.kl, s.nll, s.nll_exact, s.top1) for s in pieces), strict=True)
    return TokenScores(*(torch.cat(field, -1) for field in fields))


def summarize(scores: list[TokenScores], chunk: int = CHUNK) -> Metrics:
    """Pool the scores of windows; chunks of `chunk` positions of one window are the units of the standard errors.

    Args:
        scores: one for each batch of windows, all of its positions in it (see `joined`): what is apart here counts as
            independent.
        chunk: positions.

    Returns:
        Metrics; with a single chunk the standard errors are NaN.
    """
    sums = []
    for s in scores:
        owner = s.positions // chunk
        for row in range(s.kl.shape[0]):
            for c in owner.unique().tolist():
                at = owner == c
                nll = torch.stack([s.nll[row, at], s.nll_exact[row, at]]).double()
                nll = nll[:, ~nll[0].isnan()]
                sums.append([
                    float(at.sum()), s.kl[row, at].double().sum().item(), s.top1[row, at].double().sum().item(),
                    float(nll.shape[1]), nll[0].sum().item(), nll[1].sum().item(),
                ])  # fmt: skip
    t = torch.tensor(sums, dtype=torch.float64)
    n, kl, top1, m, nll, nll_exact = t.sum(0).tolist()
    log_ratio = (nll - nll_exact) / m
    ratio = torch.tensor(log_ratio).exp().item()
    return Metrics(
        kl=kl / n,
        kl_stderr=_stderr(t[:, 1], t[:, 0]),
        ppl=torch.tensor(nll / m).exp().item(),
        ppl_exact=torch.tensor(nll_exact / m).exp().item(),
        ppl_ratio=ratio,
        ppl_ratio_stderr=ratio * _stderr(t[:, 4] - t[:, 5], t[:, 3]),
        top1=top1 / n,
        tokens=int(n),
        chunks=len(sums),
    )


def _stderr(total: torch.Tensor, weight: torch.Tensor) -> float:
    """Standard error of sum(total) / sum(weight) over independent chunks (ratio estimator)."""
    n = len(total)
    if n < 2:
        return float("nan")
    residual = total - weight * (total.sum() / weight.sum())
    return (residual.square().sum() * n / (n - 1)).sqrt().item() / weight.sum().item()
