"""Second moments of a layer's queries, keys and values, weighted by who reads what.

Only pairs that will read a packed key count: i - j >= window and j >= sinks.  Three weightings of them:

    tokens      every token of a packed pair once
    attention   key weight sum_i p_ij (1 - p_ij), query weight the same sum over its keys, value weight sum_i p_ij
    fisher      with c_ij = d log p(y) / d s_ij (y drawn from the model): key weight sum_i c_ij**2, query weight the
                same sum over its keys; value weight sum_i p_ij**2 |g_i|**2 with g_i the gradient of output i, and
                output gradients g_i weighted by sum_j p_ij**2

The tokens that get attention are not average tokens, so the weighting matters more than the amount of text.
The fisher weights are those of the quadratic form KL ~ 1/2 E[(c . delta s)**2]: a token counts by what an error
in it does to the model's prediction.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers.pytorch_utils import Conv1D

from tq_ao.measure.capture import AttentionCall, Trace
from tq_ao.measure.simulate import row_blocks, softcapped, softmax_with_sink

PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")  # what models call W_o


@dataclass
class Moments:
    """Weighted zeroth, first and second moments per KV head, float64: [H], [H, D], [H, D, D]."""

    weight: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def zeros(cls, heads: int, dim: int, device: torch.device) -> "Moments":
        """Nothing seen yet."""
        shapes = ((heads,), (heads, dim), (heads, dim, dim))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Accumulate x [B, H, n, D] with weights [B, H, n]."""
        x, weight = x.float(), weight.float()
        weighted = x * weight.unsqueeze(-1)
        self.weight += weight.double().sum((0, 2))
        self.first += weighted.double().sum((0, 2))
        self.second += (x.mT @ weighted).double().sum(0)

    def mean(self) -> torch.Tensor:
        """Weighted mean [H, D]."""
        return self.first / self.weight.clamp_min(1e-300)[:, None]

    def covariance(self, centred: bool) -> torch.Tensor:
        """E[x x^T], or that of x minus its weighted mean: [H, D, D]."""
        second = self.second / self.weight.clamp_min(1e-300)[:, None, None]
        mean = self.mean()
        return second - mean[:, :, None] * mean[:, None, :] if centred else second


@dataclass
class LayerStatistics:
    """Moments of one layer.

    Attributes:
        moments: (what, weighting) -> Moments, what in "q", "k", "v" and, for fisher, "g" (output gradients).
        readout: W_o^T W_o summed over the query heads of each KV head, float64 [H, D, D]; None: W_o was not found.
    """

    moments: dict[tuple[str, str], Moments] = field(default_factory=dict)
    readout: torch.Tensor | None = None

    def add(self, what: str, weighting: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Accumulate x [B, H, n, D] with weights [B, H, n]."""
        key = (what, weighting)
        if key not in self.moments:
            self.moments[key] = Moments.zeros(x.shape[1], x.shape[3], x.device)
        self.moments[key].add(x, weight)


@dataclass(frozen=True)
class PairWeights:
    """Row and column sums over packed pairs: [B, H, G, N] for queries, [B, H, N] for keys and values."""

    q_attention: torch.Tensor
    k_attention: torch.Tensor
    v_attention: torch.Tensor
    q_fisher: torch.Tensor | None
    k_fisher: torch.Tensor | None
    v_fisher: torch.Tensor | None
    g_fisher: torch.Tensor | None


def packed_pairs(
    rows: torch.Tensor, columns: torch.Tensor, call: AttentionCall, window: int, sinks: int
) -> torch.Tensor:
    """Boolean [rows, columns]: query row reads key column from packed storage."""
    age = rows[:, None] - columns
    packed = (age >= window) & (columns >= sinks)
    return packed if call.sliding is None else packed & (age < call.sliding)


def attention_rows(call: AttentionCall, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled, softcapped scores and probabilities [B, H, G, rows, N'] of rows first..end over keys 0..end."""
    heads = call.k.shape[1]
    q = (call.q[:, :, first:end] * call.scaling).unflatten(1, (heads, -1)).flatten(2, 3)
    s = softcapped((q @ call.k[:, :, :end].mT).unflatten(2, (-1, end - first)), call)
    i = torch.arange(end, device=s.device)
    age = i[first:, None] - i
    hidden = (age < 0) if call.sliding is None else (age < 0) | (age >= call.sliding)
    return s, softmax_with_sink(s.masked_fill(hidden, -torch.inf), call)


def packed_rows(call: AttentionCall, window: int, sinks: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Blocks of queries some of which read packed keys, over keys 0..columns: those behind the window of the last.

    Yields:
        First and end row; scores, and probabilities that are zero where a pair is not packed, [B, H, G, rows, columns].
    """
    position = torch.arange(call.q.shape[2], device=call.q.device)
    for first, end in row_blocks(call.q.shape[2], call.q.device):
        columns = end - window
        if columns > sinks:
            s, p = attention_rows(call, first, end)
            packed = packed_pairs(position[first:end], position[:columns], call, window, sinks)
            yield first, end, s[..., :columns], p[..., :columns] * packed


def pair_weights(t: Trace, window: int, sinks: int) -> PairWeights:
    """Weights of every query, key and value of a traced window."""
    call, heads, tokens = t.call, t.call.k.shape[1], t.call.q.shape[2]
    batch, groups = call.q.shape[0], call.q.shape[1] // heads
    new = lambda *shape: torch.zeros(shape, device=call.q.device)  # noqa: E731
    qa, ka, va = new(batch, heads, groups, tokens), new(batch, heads, tokens), new(batch, heads, tokens)
    qf, kf, vf, gf = new(*qa.shape), new(*ka.shape), new(*ka.shape), new(*qa.shape)
    for first, end, s, read in packed_rows(call, window, sinks):
        columns = read.shape[-1]
        spread = read * (1 - read)
        qa[..., first:end] = spread.sum(-1)
        ka[..., :columns] += spread.sum((2, 3))
        va[..., :columns] += read.sum((2, 3))
        if t.grad is not None:
            g = t.grad[:, :, first:end].unflatten(1, (heads, groups))
            o = t.out[:, :, first:end].unflatten(1, (heads, groups))
            effect = g @ call.v[:, :, None, :columns].mT - (g * o).sum(-1, keepdim=True)
            c = read * effect
            if call.softcap:
                c = c * (1 - (s / call.softcap).square())
            c, squares = c.square(), read.square()
            qf[..., first:end] = c.sum(-1)
            kf[..., :columns] += c.sum((2, 3))
            gf[..., first:end] = squares.sum(-1)
            vf[..., :columns] += (squares * g.square().sum(-1, keepdim=True)).sum((2, 3))
    if t.grad is None:
        return PairWeights(qa, ka, va, None, None, None, None)
    return PairWeights(qa, ka, va, qf, kf, vf, gf)


def accumulate(statistics: LayerStatistics, t: Trace, window: int, sinks: int) -> None:
    """Add one traced window to a layer's statistics."""
    call, heads = t.call, t.call.k.shape[1]
    weights = pair_weights(t, window, sinks)
    q = call.q.unflatten(1, (heads, -1)).flatten(2, 3)
    once = ((weights.k_attention > 0).float(), (weights.q_attention > 0).float().flatten(2))
    statistics.add("k", "tokens", call.k, once[0])
    statistics.add("v", "tokens", call.v, once[0])
    statistics.add("q", "tokens", q, once[1])
    statistics.add("k", "attention", call.k, weights.k_attention)
    statistics.add("v", "attention", call.v, weights.v_attention)
    statistics.add("q", "attention", q, weights.q_attention.flatten(2))
    if t.grad is not None and weights.q_fisher is not None:
        assert weights.k_fisher is not None and weights.v_fisher is not None and weights.g_fisher is not None
        g = t.grad.unflatten(1, (heads, -1)).flatten(2, 3)
        statistics.add("k", "fisher", call.k, weights.k_fisher)
        statistics.add("q", "fisher", q, weights.q_fisher.flatten(2))
        statistics.add("v", "fisher", call.v, weights.v_fisher)
        statistics.add("g", "fisher", g, weights.g_fisher.flatten(2))


def readout_gram(call: AttentionCall) -> torch.Tensor | None:
    """W_o^T W_o of each KV head, float64 [H, D, D]; None if the layer has no output projection of a known name."""
    _, heads, _, dim = call.k.shape
    for name in PROJECTIONS:
        projection = getattr(call.module, name, None)
        weight = getattr(projection, "weight", None)
        if isinstance(projection, Conv1D):
            weight = projection.weight.mT
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[1] == call.q.shape[1] * dim:
            if type(weight) not in (torch.Tensor, torch.nn.Parameter):  # quantised by torchao
                weight = weight.dequantize()
            w = weight.detach().double().unflatten(1, (heads, -1, dim))  # [hidden, H, G, D]
            return torch.einsum("ohgd,ohge->hde", w, w)
    return None
