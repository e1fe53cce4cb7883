"""First-order KL of quantising one layer's K or V, from one backward pass per window.

To second order KL(p || p_changed) = 1/2 E_y[(d log p(y) . delta)**2] with y drawn from the model (the Fisher
information is the Hessian of the KL).  delta is the change of the layer's attention output, computed locally
from its q, k, v; the gradient comes from one backward pass for all layers.  Positions are treated as
independent: errors of different outputs share keys, but their gradients are nearly uncorrelated.
"""

from dataclasses import dataclass

import torch

from tq_ao.measure.capture import AttentionCall, Trace
from tq_ao.measure.simulate import requantize, softcapped, softmax_with_sink
from tq_ao.rotation import LayerMaps


@dataclass(frozen=True)
class Rows:
    """Exact attention of a sample of query rows of a traced window.

    Attributes:
        call: the layer.
        index: int64 [n], the rows.
        q: scaled queries [B, H, G * n, D].
        s, p: scores before the softcap and probabilities [B, H, G, n, N].
        packed: boolean [n, N], pairs read from packed storage.
        grad: gradient of the output [B, H, G, n, D].
        share: rows of the window per sampled row.
    """

    call: AttentionCall
    index: torch.Tensor
    q: torch.Tensor
    s: torch.Tensor
    p: torch.Tensor
    packed: torch.Tensor
    grad: torch.Tensor
    share: float


def sample_rows(t: Trace, count: int, window: int, sinks: int, generator: torch.Generator) -> Rows:
    """Draw `count` rows that read packed keys (one per stratum of consecutive rows) and compute their attention."""
    call, heads = t.call, t.call.k.shape[1]
    tokens, device = call.q.shape[2], call.q.device
    first = min(tokens, window + sinks)
    count = min(count, tokens - first)
    edges = torch.linspace(first, tokens, count + 1, dtype=torch.float64)
    draw = torch.rand(count, generator=generator, dtype=torch.float64)
    index = (edges[:-1] + draw * (edges[1:] - edges[:-1])).long().clamp_max(tokens - 1).to(device)
    age = index[:, None] - torch.arange(tokens, device=device)
    hidden = (age < 0) if call.sliding is None else (age < 0) | (age >= call.sliding)
    packed = (age >= window) & (torch.arange(tokens, device=device) >= sinks) & ~hidden
    q = (call.q[:, :, index] * call.scaling).unflatten(1, (heads, -1)).flatten(2, 3)
    s = (q @ call.k.mT).unflatten(2, (-1, count)).masked_fill_(hidden, -torch.inf)
    p = softmax_with_sink(softcapped(s, call), call)
    if t.grad is None:
        raise ValueError("expected a trace with gradients; call trace(..., gradient=True)")
    grad = t.grad[:, :, index].unflatten(1, (heads, -1))
    return Rows(call, index, q, s, p, packed, grad, (tokens - first) / max(1, count))


def key_delta(rows: Rows, maps: LayerMaps, bits: int) -> torch.Tensor:
    """Change of the sampled outputs [B, H, G, n, D] when packed keys have `bits` bits."""
    call = rows.call
    k_hat = requantize(call.k, maps.key, maps.query.mT, maps.key_shift, bits, maps.key_feedback)
    change = (rows.q @ (k_hat - call.k).mT).unflatten(2, rows.s.shape[2:4])
    p = softmax_with_sink(softcapped(torch.where(rows.packed, rows.s + change, rows.s), call), call)
    return ((p - rows.p).flatten(2, 3) @ call.v).unflatten(2, rows.s.shape[2:4])


def value_delta(rows: Rows, maps: LayerMaps, bits: int) -> torch.Tensor:
    """Change of the sampled outputs [B, H, G, n, D] when packed values have `bits` bits."""
    v = rows.call.v
    v_hat = requantize(v, maps.value, maps.output, maps.value_shift, bits, maps.value_feedback)
    return ((rows.p * rows.packed).flatten(2, 3) @ (v_hat - v)).unflatten(2, rows.s.shape[2:4])


def fisher_kl(rows: Rows, delta: torch.Tensor) -> float:
    """Summed KL over the window's positions: 1/2 sum_i (g_i . delta_i)**2, all heads of a position together."""
    dot = (rows.grad * delta).sum((1, 2, 4))  # [B, n]
    return 0.5 * dot.double().square().sum().item() * rows.share
