"""Metrics against their definitions, and the simulation against the exact model."""

import math

import pytest
import tiny
import torch

from tq_ao.evaluation.kivi import kivi, min_max
from tq_ao.evaluation.setup import plain_maps
from tq_ao.measure.evaluator import Evaluator
from tq_ao.measure.metrics import TokenScores, joined, score, summarize
from tq_ao.measure.simulate import LayerPlan


def test_score_by_definition(rng):
    a, b = torch.randn(2, 2, 10, 13, generator=rng)
    ids = torch.randint(0, 13, (2, 10), generator=rng)
    found = score(a, b, ids, torch.arange(10))
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    torch.testing.assert_close(found.kl.double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll[:, 3].double(), -q[[0, 1], 3, ids[:, 4]].log(), rtol=1e-4, atol=1e-5)
    assert found.nll[:, -1].isnan().all()
    assert torch.equal(found.top1, (a.argmax(-1) == b.argmax(-1)).float())


def test_summary_pools_windows_and_its_errors_come_from_chunks(rng):
    scores = []
    for level in (1.0, 3.0):
        ids = torch.randint(0, 13, (1, 64), generator=rng)
        a = torch.randn(1, 64, 13, generator=rng)
        scores.append(score(a, a + level * torch.randn(1, 64, 13, generator=rng) / 10, ids, torch.arange(64)))
    found = summarize(scores, chunk=16)
    kl = torch.stack([s.kl[0] for s in scores])
    means = kl.unflatten(1, (4, 16)).mean(-1).flatten()
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_stderr == pytest.approx((means.std() / math.sqrt(8)).item(), rel=1e-4)
    assert (found.tokens, found.chunks) == (128, 8)
    ratio = torch.cat([(s.nll - s.nll_exact)[0, :-1] for s in scores]).mean().exp().item()
    assert found.ppl_ratio == pytest.approx(ratio, rel=1e-5)


def test_pieces_of_a_window_are_no_chunks_of_their_own(rng):
    ids = torch.randint(0, 13, (2, 96), generator=rng)
    a, b = torch.randn(2, 2, 96, 13, generator=rng)
    whole = score(a, b, ids, torch.arange(96))
    pieces = [score(a[:, at], b[:, at], ids, at) for at in torch.arange(96).split(20)]
    together = joined(pieces)
    assert torch.equal(together.positions, whole.positions)
    torch.testing.assert_close(together.nll_exact, whole.nll_exact, equal_nan=True)
    found, want = summarize([together], chunk=32), summarize([whole], chunk=32)
    assert found.chunks == want.chunks == 6 and found.kl_stderr == pytest.approx(want.kl_stderr)
    assert math.isnan(summarize([score(a[:1], b[:1], ids[:1], torch.arange(96))]).kl_stderr)


def test_chunks_are_stretches_of_text_however_few_positions_are_read(rng):
    positions = torch.arange(0, 1024, 2)
    x = torch.rand(1, 512, generator=rng)
    assert summarize([TokenScores(positions, x, x, x, x)], chunk=512).chunks == 2


def test_simulation_is_exact_without_plans_and_worse_with_fewer_bits(rng):
    model = tiny.model()
    evaluate = Evaluator(model, torch.randint(2, 97, (2, 120), generator=rng), window=16, sinks=2, skip=20)
    maps = plain_maps(model, [0, 1, 2])
    assert evaluate({}).kl < 1e-7
    kls = [evaluate({i: LayerPlan(b, b, m) for i, m in maps.items()}).kl for b in (1, 2, 4, 8)]
    assert kls[0] > kls[1] > kls[2] > kls[3] > 0
    four, two = (evaluate.measure(kivi({0, 1, 2}, bits, window=16, sinks=2)).kl for bits in (4, 2))
    assert 0 < four < two


def test_min_max_keeps_the_ends(rng):
    x = torch.randn(5, 32, generator=rng)
    rounded = min_max(x, 4)
    step = (x.amax(-1) - x.amin(-1)) / 15
    assert ((rounded - x).abs() <= 0.55 * step[:, None] + 1e-2).all()
    assert (rounded.round(decimals=4).unique(dim=-1).shape[-1]) <= 16 * 5
