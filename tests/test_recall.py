import random
import re

import pytest
import torch
from characters import CharacterTokenizer
from transformers import AutoTokenizer

from tq_ao.errors import TextError
from tq_ao.evaluation import haystack
from tq_ao.recall import FORMS, SPACING, recall_windows
from tq_ao.text import articles, split_articles

WORDS = "amphora bridge candle donkey engine feather galaxy harbour island jungle kettle lantern meadow needle".split()


@pytest.fixture
def texts(seed):
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(200)) for _ in range(3)]


def records(text):
    """(word, number) of every record, and where the record stands, by the form found most often."""
    found = []
    for form in FORMS:
        pattern = re.escape(form).replace(r"\{\}", r"(\w+)", 1).replace(r"\{\}", r"(\d+)", 1)
        found.append([(match[1], match[2], match.start()) for match in re.finditer(pattern, text)])
    return max(found, key=len)


def test_every_record_stands_early_and_again_far_behind(texts, seed):
    length = random.Random(seed).randrange(900, 1100)
    tokens = recall_windows(CharacterTokenizer(), texts, length, 4, seed)
    assert tokens.shape == (4, length) and tokens.dtype == torch.int64
    for row in tokens:
        found = records(CharacterTokenizer().decode(row))
        numbers = {}
        for word, number, _ in found:
            assert word in WORDS and 3 <= len(number) <= 6
            assert numbers.setdefault(word, number) == number, "one number for a word"
        assert len(numbers) == length // SPACING
        order = [word for word, _, _ in found]
        assert len(set(order[: len(numbers)])) == len(numbers), "all of them once before any comes again"
        quoted = order[len(numbers) : 2 * len(numbers)]
        assert len(quoted) > 2 and quoted != order[: len(quoted)]


def test_seed_and_number_of_the_window_decide(texts, seed):
    make = lambda seed, count=3: recall_windows(CharacterTokenizer(), texts, 400, count, seed)  # noqa: E731
    assert torch.equal(make(seed), make(seed)) and torch.equal(make(seed)[:2], make(seed, 2))
    assert not torch.equal(make(seed), make(seed + 1))
    assert len(torch.unique(make(seed), dim=0)) == 3
    assert make(seed, 0).shape == (0, 400)


def test_a_quarter_or_more_of_a_window_recalls_and_nothing_looks_like_the_evaluation(smollm2, seed):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    calibration = split_articles(articles("enwiki"), 0)[0]
    for row in recall_windows(tokenizer, calibration, 2048, 3, seed):
        text = tokenizer.decode(row)
        found = records(text)
        first = {}
        for word, _, start in found:
            first.setdefault(word, start)
        assert len(first) >= 2048 // SPACING - 1 and len(found) > 2 * len(first)
        again = [start for word, _, start in found if start != first[word]]
        assert len(tokenizer(text[: again[0]])["input_ids"]) < 0.75 * 2048
    for fact in haystack.passkey(0.5, random.Random(seed)) + haystack.key_value(5, random.Random(seed)):
        sentence = re.sub(r"\d+|" + "|".join(haystack.KEYS), "{}", fact.sentence)
        assert not any(form.strip() in sentence for form in FORMS)


def test_windows_begin_with_bos_where_text_does(gemma3, seed):
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    tokens = recall_windows(tokenizer, articles("enwiki")[:3], 300, 2, seed)
    assert tokens.shape == (2, 300)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all() and (tokens[:, 1:] != tokenizer.bos_token_id).all()


def test_text_without_long_words_gives_what_it_has(seed):
    draw = random.Random(seed)
    counted = " ".join(str(draw.randrange(10, 100)) for _ in range(400))
    (row,) = recall_windows(CharacterTokenizer(), [counted], 600, 1, seed)
    found = records(CharacterTokenizer().decode(row))
    assert len({word for word, _, _ in found}) == 7 and all(len(word) == 2 for word, _, _ in found)


def test_too_little_text_says_what_is_missing(texts, seed):
    with pytest.raises(
        TextError, match=r"2000 tokens with 23 different words .* with 14: give more text, or --recall-windows 0"
    ):
        recall_windows(CharacterTokenizer(), texts, 2000, 1, seed)
    with pytest.raises(TextError, match="got 37 tokens with 5"):
        recall_windows(CharacterTokenizer(), [" ".join(WORDS[:5])], 300, 1, seed)
    with pytest.raises(ValueError, match="length >= 170"):
        recall_windows(CharacterTokenizer(), texts, 100, 1, seed)
