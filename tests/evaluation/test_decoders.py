"""Fitted decoders: they are of the codes that the maps make."""

from dataclasses import replace

import layer_state
import tiny
import torch

from tq_ao.evaluation.decoders import refit
from tq_ao.measure.simulate import LayerPlan


def test_refitted_decoders_are_those_of_the_codes_with_feedback(rng):
    windows = torch.randint(2, 97, (1, 160), generator=rng)
    model, fed = tiny.model(), layer_state.maps(2, 32, rng, feedback=True)
    for side, name in (("key", "query"), ("value", "output")):
        bare = replace(fed, **{f"{side}_feedback": None})
        found = [
            getattr(refit(model, windows, {1: LayerPlan(2, 2, m)}, window=16, sinks=2, sides=(side,))[1], name)
            for m in (fed, bare)
        ]
        assert not torch.equal(*found)
