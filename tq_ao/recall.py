"""Calibration text in which far tokens matter: records scattered over articles and quoted again at the end.

In ordinary articles little depends on what stands hundreds of tokens back, so the attention heads that look such things
up hardly show in statistics taken there.  Here they decide: names and numbers are drawn at random, so nothing but the
packed record itself says which number follows a name.
"""

import random
import re
from typing import TYPE_CHECKING

import torch

from tq_ao.errors import TextError
from tq_ao.text import beginning, token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = ("\n\n{}: {}\n\n", "\n{} = {}\n", "\n\n{} has {}.\n\n", "\n- {} ({})\n", "\n\nNumber of {}: {}\n\n")
SPACING = 85  # tokens of a window per record
_WORDS = (r"\b[^\W\d_]{5,10}\b", r"\w+")  # any words where the text has too few of the first kind


def recall_windows(
    tokenizer: "PreTrainedTokenizerBase", articles: list[str], length: int, count: int, seed: int
) -> torch.Tensor:
    """Windows of records: each first stands once between pieces of articles, then all again and again in random order.

    A record is a word of the articles (of 5 to 10 letters, if there are enough) and a random number of three to six
    digits, in one of FORMS, the same for a whole window.  Windows begin with a BOS token where the tokenizer gives one.

    Args:
        length: tokens of a window; a longer one has more records.
        seed: of everything drawn, with the number of the window.

    Returns:
        int64 [count, length].

    Raises:
        TextError: articles with fewer words, or fewer tokens, than one window needs.
    """
    if length < 2 * SPACING or count < 0:
        raise ValueError(f"expected length >= {2 * SPACING} and count >= 0, got length {length}, count {count}")
    if count == 0:
        return torch.zeros(0, length, dtype=torch.int64)
    stream, bos = token_stream(tokenizer, articles), beginning(tokenizer)
    records = length // SPACING
    words: list[str] = []
    for pattern in _WORDS:
        if len(words) < records:
            words = sorted({word for article in articles for word in re.findall(pattern, article)})
    if len(words) < records or len(stream) < length:
        raise TextError(
            f"expected text of {length} tokens with {records} different words for recall windows, "
            f"got {len(stream)} tokens with {len(words)}: give more text, or --recall-windows 0 (recall in a recipe)"
        )
    draws = [random.Random(f"{seed} {i}") for i in range(count)]
    made = [bos + _window(tokenizer, stream, words, length, records, draw) for draw in draws]
    return torch.tensor([ids[:length] for ids in made], dtype=torch.int64)


def _window(
    tokenizer: "PreTrainedTokenizerBase", stream: list[int], words: list[str], length: int, count: int,
    draw: random.Random,
) -> list[int]:  # fmt: skip
    """At least `length` tokens."""

    def article(low: int, high: int) -> list[int]:
        size = draw.randrange(low, high)
        start = draw.randrange(len(stream) - size)
        return stream[start : start + size]

    form = draw.choice(FORMS)
    records = []
    for word in draw.sample(words, count):
        digits = draw.randrange(3, 7)
        text = form.format(word, draw.randrange(10 ** (digits - 1), 10**digits))
        records.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = [token for record in records for token in article(16, 60) + record]
    while len(ids) < length:
        for record in draw.sample(records, count):
            ids += record + (article(0, 12) if draw.random() < 0.5 else [])
    return ids
