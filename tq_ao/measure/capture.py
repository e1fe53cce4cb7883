"""Stand between a transformers decoder and its attention: see, replace or differentiate every layer's q, k, v.

Works for every model whose attention goes through transformers' `AttentionInterface` (Llama, Qwen, Gemma,
Mistral, Phi, ...).  Rows are whole unpadded windows, so the mask is causal plus the layer's sliding window.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

_NAME = "tq_ao_intercept"


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention over a whole window.

    Attributes:
        layer: index of the layer.
        q: post-RoPE queries [B, Hq, N, D]; query head h reads KV head h // (Hq / H).
        k, v: post-RoPE keys, and values [B, H, N, D].
        scaling: multiplies q.k.
        softcap: cap * tanh(s / cap) on scaled scores if > 0.
        sliding: a query sees this many newest keys, itself included; None for full attention.
        sink_logits: [Hq] logits of a virtual key of value 0 (gpt-oss), or None.
        module: the layer's attention, if it is a model's.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scaling: float
    softcap: float = 0.0
    sliding: int | None = None
    sink_logits: torch.Tensor | None = None
    module: torch.nn.Module | None = None

    def float(self) -> "AttentionCall":
        """The same call, detached and in float32."""
        return replace(self, q=self.q.detach().float(), k=self.k.detach().float(), v=self.v.detach().float())


GOLDEN = 0.6180339887498949
Handler = Callable[[AttentionCall], torch.Tensor]  # returns [B, Hq, N, D]
_handlers: list[Handler] = []


@contextmanager
def intercept(model: torch.nn.Module, handler: Handler) -> Iterator[None]:
    """While active, the model's attention layers call `handler` instead of their attention function.

    Args:
        model: a transformers model; its attention implementation is restored on exit.
        handler: maps an `AttentionCall` to the attention output [B, Hq, N, D] (`exact` is the identity).

    Raises:
        ValueError: the model does not use transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from tq_ao.attention import exchange_attention

    AttentionInterface.register(_NAME, _dispatch)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    exchange_attention(model, _NAME)
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.pop()
        model.set_attn_implementation(before)


def _dispatch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if key.shape[-1] != value.shape[-1] or query.shape[2] != key.shape[2]:
        raise TypeError(
            f"expected whole windows with keys and values of one head_dim, got q {tuple(query.shape)}, "
            f"k {tuple(key.shape)}, v {tuple(value.shape)}; multi-head latent attention is not supported"
        )
    layer: Any = module.layer_idx
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(layer, query, key, value, scaling, softcap or 0.0, sliding_window, s_aux, module)
    return _handlers[-1](call).transpose(1, 2).contiguous(), None


def exact(call: AttentionCall) -> torch.Tensor:
    """Exact causal attention [B, Hq, N, D], differentiable; without a softcap or virtual sink it is SDPA."""
    tokens = call.q.shape[2]
    groups = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
    hidden = hidden_pairs(tokens, call.sliding, call.q.device)
    if not call.softcap and call.sink_logits is None:
        if call.sliding is None or call.sliding >= tokens:
            return F.scaled_dot_product_attention(call.q, k, v, is_causal=True, scale=call.scaling)
        return F.scaled_dot_product_attention(call.q, k, v, attn_mask=~hidden, scale=call.scaling)
    s = call.q @ k.mT * call.scaling
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    s = s.masked_fill(hidden, -torch.inf)
    if call.sink_logits is None:
        return torch.softmax(s, -1) @ v
    extra = call.sink_logits.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)
    return torch.softmax(torch.cat([s, extra], -1), -1)[..., :-1] @ v


def hidden_pairs(tokens: int, sliding: int | None, device: torch.device | str | None = None) -> torch.Tensor:
    """Boolean [tokens, tokens], true where query i does not see key j."""
    i = torch.arange(tokens, device=device)
    age = i[:, None] - i
    return (age < 0) if sliding is None else (age < 0) | (age >= sliding)


def window_start(n: int, length: int, context: int) -> int:
    """Position at which calibration window n of `length` tokens is read, for a cache that is to hold `context` tokens.

    The first window stands at 0, the others are spread (multiples of the golden ratio, squared: more of them early).
    What RoPE makes of a key depends on where it stands: maps from windows at 0 alone fail on keys far behind them.
    """
    return int(max(0, context - length) * (n * GOLDEN % 1) ** 2)


@dataclass
class Trace:
    """A layer's call on one window, its output and the output's gradient (or None)."""

    call: AttentionCall
    out: torch.Tensor
    grad: torch.Tensor | None = None


def trace(
    model: torch.nn.Module,
    ids: torch.Tensor,
    *,
    gradient: bool,
    generator: torch.Generator | None = None,
    skip: int = 0,
    start: int = 0,
) -> dict[int, Trace]:
    """Run windows and keep every layer's q, k, v and output; optionally the gradient of a sampled log-likelihood.

    The gradient is d/d(out) of sum_t log p(y_t | x_<=t) over positions t >= skip, with labels y_t drawn from the
    model's own next-token distribution: the per-sample score whose outer product estimates the Fisher information.

    Args:
        model: a transformers causal LM in eval mode.
        ids: int64 [B, N].
        gradient: also run the backward pass.
        generator: draws the labels (a CPU generator).
        start: position of the windows' first token, for models that rotate queries and keys by it (RoPE).

    Returns:
        layer -> Trace; tensors are float32 on the model's device.
    """
    traces: dict[int, Trace] = {}
    probes: dict[int, torch.Tensor] = {}

    def handler(call: AttentionCall) -> torch.Tensor:
        out = exact(call)
        traces[call.layer] = Trace(call.float(), out.detach().float())
        if not gradient:
            return out
        probes[call.layer] = torch.zeros_like(out, requires_grad=True)
        return out + probes[call.layer]

    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        with intercept(model, handler), torch.set_grad_enabled(gradient):
            place = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
            logits = model(ids, position_ids=place, use_cache=False, logits_to_keep=place[0, skip:] - start).logits
            if gradient:
                _sampled_log_likelihood(logits, generator).backward()
    finally:
        for p in wanted:
            p.requires_grad_(True)
    for layer, probe in probes.items():
        traces[layer].grad = None if probe.grad is None else probe.grad.float()
    return traces


def _sampled_log_likelihood(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Sum of log p(y) with y ~ p, by inverting the distribution function at a uniform draw."""
    uniform = torch.rand(logits.shape[:-1], generator=generator).to(logits.device)
    total = logits.new_zeros((), dtype=torch.float32)
    for rows, draw in zip(logits.flatten(0, 1).split(256), uniform.flatten().split(256), strict=True):
        log_p = torch.log_softmax(rows.float(), -1)
        cdf = log_p.detach().exp().cumsum(-1)
        label = torch.searchsorted(cdf, (draw * cdf[:, -1]).unsqueeze(-1)).clamp_max(rows.shape[-1] - 1)
        total = total + log_p.gather(-1, label).sum()
    return total
