"""Finding a fact in a long text that is read from packed storage: right answers and their log-probability.

The text goes into the cache first and the question follows in a later call, so the fact is read from codes.  (The call
that fills an empty cache attends exact keys and values in any case, so one exact prefill serves every cache: each packs
the same keys and values that a prefill of its own would have given it.)
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from tq_ao.cache import TurboQuantCache, cache_argument
from tq_ao.cache_layer import TurboQuantLayer
from tq_ao.evaluation.decode_kl import prove_packed
from tq_ao.evaluation.haystack import Prompt, Question
from tq_ao.packing import TILE

CHUNK = 1024  # tokens of the prefill in one call


@dataclass(frozen=True)
class Contender:
    """A cache to be asked.

    Attributes:
        method: its name.
        code_bits: per value, on average.
        make: an empty packed cache; None: the exact one.
        bfloat16: round the exact one, if it is float32, to what a model in bfloat16 would hold.
    """

    method: str
    code_bits: float
    make: Callable[[], TurboQuantCache] | None = None
    bfloat16: bool = False


@dataclass(frozen=True)
class Trial:
    """One question asked of one cache: whether greedy decoding answers it, and the answer's log-probability."""

    prompt: int
    depth: float
    right: bool
    log_probability: float


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """Exact cache of the tokens int64 [1, N]."""
    cache = DynamicCache(config=model.config)
    for piece in ids.to(model.device).split(CHUNK, 1):
        model(piece, **{cache_argument(model): cache}, logits_to_keep=1)
    return cache


def packed(empty: TurboQuantCache, exact: DynamicCache) -> TurboQuantCache:
    """`empty`, holding what it would hold after a prefill of the same tokens in one call."""
    for i, (ours, theirs) in enumerate(zip(empty.layers, exact.layers, strict=True)):
        if isinstance(ours, TurboQuantLayer):
            ours.update(theirs.keys, theirs.values)
        else:
            empty.layers[i] = copy.deepcopy(theirs)
    return empty


def bytes_per_token(cache: Cache) -> float:
    """Bytes that one more token of batch 1 costs in the long run, from the tensors of all full-attention layers.

    Packed layers: codes and scales.  Others: K and V counted in bfloat16, whatever they are in here.
    """
    total = 0.0
    for layer in cache.layers:
        if isinstance(layer, TurboQuantLayer):
            total += layer.nbytes()["packed"] / (layer.k_scales.shape[2] * TILE)
        elif not layer.is_sliding:
            total += 2 * (layer.keys.numel() + layer.values.numel()) / layer.keys.shape[2]
    return total


def packed_tokens(cache: Cache) -> int:
    """Tokens held as codes by every packed layer, counted from the scales that are not zero."""
    if not isinstance(cache, TurboQuantCache):
        return 0
    return min(int((scales != 0).sum()) for layer in cache.packed_layers() for scales in layer.k_scales[0])


def in_bfloat16(cache: DynamicCache) -> DynamicCache:
    """A copy with keys and values rounded to bfloat16, in the dtype they had."""
    rounded = copy.deepcopy(cache)
    for layer in rounded.layers:
        layer.keys, layer.values = (x.bfloat16().to(x.dtype) for x in (layer.keys, layer.values))
    return rounded


def check_packed(cache: TurboQuantCache, prompt: Prompt, name: str) -> None:
    """Raise RuntimeError unless every fact of the prompt lies in tokens the cache holds as codes."""
    prove_packed(cache, name)
    first, last = cache.quantization.sinks, cache.quantization.sinks + packed_tokens(cache)
    for question in prompt.questions:
        if not first <= question.span[0] < question.span[1] <= last:
            raise RuntimeError(
                f"{name}: expected the fact in tokens {question.span} to be packed, but only {first} .. {last} are"
            )


@torch.no_grad()
def ask(model: PreTrainedModel, cache: Cache, question: Question) -> tuple[bool, float]:
    """Ask one question of a cache, which stays as it is.

    The question is one call, each token of the answer another.  As long as the most likely token is the right one this
    is greedy decoding; after that the right tokens go on being fed, for their probability.

    Returns:
        Whether greedy decoding gives the answer; log-probability of the answer in nats.
    """
    given, fed = {cache_argument(model): copy.deepcopy(cache)}, question.ids.to(model.device)
    right, total = True, 0.0
    for token in question.answer.tolist():
        log_p = torch.log_softmax(model(fed, **given, logits_to_keep=1).logits[0, -1].float(), -1)
        right = right and int(log_p.argmax()) == token
        total += log_p[token].item()
        fed = torch.tensor([[token]], device=model.device)
    return right, total


def retrieval(
    model: PreTrainedModel,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Ask every question of every prompt (all of one length) of every contender.

    Returns:
        Rows {task, tokens, method, code_bits, prompts, questions, right, log_probability, log_probability_stderr,
        change, change_stderr, lost, gained, packed_tokens, bytes_per_token, by_depth: {depth: [right, questions]}}.
        `change` is that of the log-probability against the first contender, `lost` and `gained` are answers that only
        it, or only this one, has right; standard errors are over prompts.

    Raises:
        RuntimeError: a fact that a packed cache does not hold as codes.
    """
    trials: dict[tuple[str, int], list[Trial]] = {}
    storage: dict[int, dict[str, float]] = {}
    for number, prompt in enumerate(prompts):
        exact, rights = prefill(model, prompt.ids), []
        for i, contender in enumerate(contenders):
            cache: Cache = in_bfloat16(exact) if contender.bfloat16 else exact
            if contender.make is not None:
                cache = packed(contender.make(), exact)
                check_packed(cache, prompt, f"{contender.method}, {contender.code_bits:g} bits")
            storage[i] = {"packed_tokens": packed_tokens(cache), "bytes_per_token": bytes_per_token(cache)}
            asked = [Trial(number, q.depth, *ask(model, cache, q)) for q in prompt.questions]
            trials.setdefault((prompt.task, i), []).extend(asked)
            rights.append(sum(t.right for t in asked))
        report(f"{prompt.ids.shape[1]} tokens, {prompt.task}: right of {len(prompt.questions)}: {rights}")
    tokens = prompts[0].ids.shape[1]
    return [
        {"task": task, "tokens": tokens, "method": contenders[i].method, "code_bits": contenders[i].code_bits}
        | summary(asked, trials[task, 0])
        | storage[i]
        for (task, i), asked in sorted(trials.items())
    ]


def summary(trials: Sequence[Trial], reference: Sequence[Trial]) -> dict[str, Any]:
    """Counts and means of one cache's trials, and their change against those of another for the same questions."""
    by_prompt: dict[int, list[tuple[float, float]]] = {}
    by_depth: dict[str, list[int]] = {}
    for one, other in zip(trials, reference, strict=True):
        pair = (one.log_probability, one.log_probability - other.log_probability)
        by_prompt.setdefault(one.prompt, []).append(pair)
        count = by_depth.setdefault(f"{one.depth:.2f}", [0, 0])
        count[0] += one.right
        count[1] += 1
    means = [[statistics.fmean(column) for column in zip(*pairs, strict=True)] for pairs in by_prompt.values()]
    levels, changes = zip(*means, strict=True)
    return {
        "prompts": len(by_prompt), "questions": len(trials), "right": sum(t.right for t in trials),
        "log_probability": statistics.fmean(levels), "log_probability_stderr": _stderr(levels),
        "change": statistics.fmean(changes), "change_stderr": _stderr(changes),
        "lost": sum(other.right and not one.right for one, other in zip(trials, reference, strict=True)),
        "gained": sum(one.right and not other.right for one, other in zip(trials, reference, strict=True)),
        "by_depth": by_depth,
    }  # fmt: skip


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
