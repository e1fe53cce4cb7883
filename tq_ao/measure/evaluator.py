"""Measure schedules against the exact model on fixed windows, keeping the exact logits."""

from collections.abc import Mapping

import torch

from tq_ao.measure.capture import Handler, exact, intercept
from tq_ao.measure.metrics import SKIP, Metrics, score, summarize
from tq_ao.measure.simulate import LayerPlan, handler


class Evaluator:
    """Simulated KL, perplexity and agreement of layer plans on some windows.

    Args:
        model: transformers causal LM in eval mode.
        windows: int64 [n, N], evaluated one by one.
        window, sinks: of the simulated cache.
        stride: evaluate every stride-th position from `skip` on (the text is still read whole).
        skip: first position evaluated.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        windows: torch.Tensor,
        *,
        window: int,
        sinks: int,
        stride: int = 1,
        skip: int = SKIP,
    ) -> None:
        self.model, self.windows, self.window, self.sinks = model, windows, window, sinks
        self.positions = torch.arange(min(skip, windows.shape[1] - 1), windows.shape[1], stride)
        self._exact = [self._logits(row, exact) for row in windows.split(1)]

    @torch.no_grad()
    def _logits(self, ids: torch.Tensor, attention: Handler) -> torch.Tensor:
        device = next(self.model.parameters()).device
        with intercept(self.model, attention):
            return self.model(ids.to(device), use_cache=False, logits_to_keep=self.positions.to(device)).logits

    def measure(self, attention: Handler) -> Metrics:
        """Metrics of the model with another attention function."""
        pairs = zip(self.windows.split(1), self._exact, strict=True)
        return summarize(
            [score(reference, self._logits(ids, attention), ids, self.positions) for ids, reference in pairs]
        )

    def __call__(self, plans: Mapping[int, LayerPlan]) -> Metrics:
        """Metrics of a schedule: layer -> plan; layers without a plan stay exact."""
        return self.measure(handler(plans, window=self.window, sinks=self.sinks))
