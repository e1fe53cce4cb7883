"""Quality through the real cache: the text is fed in chunks, each reading what the cache has stored so far.

A chunk of 32 tokens, one tile, sees what token-by-token decoding sees: a tile is packed when it has left the
window, so within an aligned chunk the packed part is that of its first token.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from tq_ao.cache import TurboQuantCache, cache_argument
from tq_ao.measure.metrics import SKIP, Metrics, TokenScores, joined, score, summarize


@torch.no_grad()
def evaluate_caches(
    model: PreTrainedModel,
    windows: torch.Tensor,
    make_caches: Mapping[str, Callable[[], Cache]],
    *,
    chunk: int = 32,
    skip: int = SKIP,
    rows: int = 4,
    progress: bool = False,
    reference: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Metrics]:
    """Next-token metrics of several caches against the exact one, in one pass over the text.

    Args:
        model: causal LM with `tq_ao` attached (its attention must read packed tensors).
        windows: int64 [n, N].
        make_caches: name -> maker of an empty cache.
        chunk: tokens fed at a time.
        skip: first position evaluated.
        rows: windows per batch.
        progress: tqdm bar.
        reference: makes a context in which the model is the one to compare with (see `fold.Folded.original`).

    Returns:
        name -> Metrics.

    Raises:
        ValueError: windows of no more than `skip` tokens.
        RuntimeError: a TurboQuantCache that holds no packed tokens after the text: nothing would have been measured.
    """
    if windows.shape[1] <= skip:
        raise ValueError(f"expected windows of more than {skip} tokens, which are skipped, got {windows.shape[1]}")
    scores: dict[str, list[TokenScores]] = {name: [] for name in make_caches}
    device, name_of_cache = next(model.parameters()).device, cache_argument(model)
    batches = windows.split(rows)
    steps = range(0, windows.shape[1], chunk)
    with tqdm(total=len(batches) * len(steps), desc="reading through the cache", disable=not progress) as bar:
        for ids in batches:
            exact: Cache = DynamicCache(config=model.config)
            caches = {name: make() for name, make in make_caches.items()}
            pieces: dict[str, list[TokenScores]] = {name: [] for name in make_caches}
            for at in steps:
                piece = ids[:, at : at + chunk].to(device)
                with reference():
                    wanted = model(piece, **{name_of_cache: exact}, use_cache=True).logits
                positions = torch.arange(at, at + piece.shape[1])
                kept = positions >= skip
                for name, cache in caches.items():
                    logits = model(piece, **{name_of_cache: cache}, use_cache=True).logits
                    if kept.any():
                        pieces[name].append(score(wanted[:, kept], logits[:, kept], ids, positions[kept]))
                bar.update()
            for name, cache in caches.items():
                scores[name].append(joined(pieces[name]))
                if isinstance(cache, TurboQuantCache):
                    prove_packed(cache, name)
    return {name: summarize(part) for name, part in scores.items()}


def prove_packed(cache: TurboQuantCache, name: str = "cache") -> float:
    """Bits per packed value, counted from the storage that holds codes.

    Raises:
        RuntimeError: some packed layer has no codes written.
    """
    layers = cache.packed_layers()
    if not layers or not all(bool(t.any()) for layer in layers for t in (layer.k_codes, layer.v_codes)):
        raise RuntimeError(
            f"{name}: expected packed codes in every scheduled layer, found a layer without; "
            "use text longer than sinks + window + 32 tokens and a schedule that packs some layer"
        )
    held = sum(layer.nbytes()["packed"] for layer in layers)
    values = sum(2 * layer.k_scales.numel() * layer.head_dim for layer in layers)
    return 8 * held / values
