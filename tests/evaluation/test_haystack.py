"""Facts lie where a prompt says they lie, in text that is otherwise as it was."""

import random

import pytest
import torch
from characters import CharacterTokenizer

from tq_ao.errors import TextError
from tq_ao.evaluation.haystack import hide, key_value, passkey, prompts

TOKENIZER = CharacterTokenizer()


def text(length, draw):
    """Sentences of random words, `length` characters."""
    words = " ".join(
        "".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) + draw.choice(["", "", "."]) for _ in range(length)
    )
    return torch.tensor(TOKENIZER(words[:length])["input_ids"])


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_facts_are_where_they_should_be(pairs, seed):
    draw = random.Random(seed)
    filler, first, last = text(1500, draw), draw.randint(0, 40), draw.randint(1200, 1500)
    facts = key_value(pairs, draw) if pairs > 1 else passkey(draw.random(), draw)
    prompt = hide("task", TOKENIZER, filler, facts, first, last)
    assert prompt.ids.shape == (1, 1500)
    left, end = [], 0
    for fact, question in zip(facts, prompt.questions, strict=True):
        a, b = question.span
        assert first <= a < b <= last and a >= end
        assert TOKENIZER.decode(prompt.ids[0, a:b]) == fact.sentence
        assert fact.answer in fact.sentence and fact.answer not in fact.question
        assert TOKENIZER.decode(question.ids[0]) == fact.question
        assert TOKENIZER.decode(question.answer) == fact.answer
        wanted = first + round(fact.depth * (last - first - (b - a)))
        assert 0 <= wanted - a <= 48 or a in (first, end)
        if a not in (first, end) and "." in TOKENIZER.decode(prompt.ids[0, max(first, end, a - 40) : a]):
            assert TOKENIZER.decode(prompt.ids[0, a - 1]) == "."
        left.append(prompt.ids[0, end:a])
        end = b
    left = torch.cat([*left, prompt.ids[0, end:]])
    assert torch.equal(left, filler[: len(left)])
    assert len({fact.answer for fact in facts}) == len({fact.question for fact in facts}) == pairs


def test_no_room_is_an_error(seed):
    draw = random.Random(seed)
    with pytest.raises(TextError, match="room"):
        hide("task", TOKENIZER, text(900, draw), key_value(5, draw), 0, 300)


def test_prompts_vary_in_depth_numbers_and_task(seed):
    draw = random.Random(seed)
    filler = torch.stack([text(1500, draw) for _ in range(5)])
    made = prompts(TOKENIZER, filler, 4, 1400, seed)
    found = [p.questions[0].depth for p in made if p.task == "passkey"]
    assert found == [0, 0.25, 0.5, 0.75, 1]
    assert sum(p.task == "key-value" for p in made) == 3
    answers = [tuple(q.answer.tolist()) for p in made for q in p.questions]
    assert len(set(answers)) > 15  # of 20; two of 90,000 may agree
    again = prompts(TOKENIZER, filler, 4, 1400, seed)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(made, again, strict=True))
    other = prompts(TOKENIZER, filler, 4, 1400, seed + 1)
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(made, other, strict=True))
