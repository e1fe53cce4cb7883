"""Prompts for retrieval: facts hidden at known places of long text, and a question for each.

`passkey` hides one fact (Mohtashami & Jaggi, arXiv 2305.16300), `key_value` several of one form, of which a question
names one.  Facts stand between paragraphs of ordinary articles; the prompt ends with text, and the question is kept
apart, so that it can be asked in a later call than the one that fills the cache.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tq_ao.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = (
    "amber", "basil", "cedar", "copper", "coral", "crimson", "ebony", "falcon", "garnet", "hazel", "heron", "indigo",
    "ivory", "jasmine", "juniper", "lilac", "magenta", "maple", "marble", "olive", "pearl", "poppy", "quartz", "raven",
    "saffron", "sparrow", "tulip", "velvet", "walnut", "willow",
)  # fmt: skip
_LOOK_BACK = 48  # tokens searched for the end of a sentence


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, the question for it, the answer that must follow the question, and where: 0 first, 1 last."""

    sentence: str
    question: str
    answer: str
    depth: float


@dataclass(frozen=True)
class Question:
    """What is asked about a prompt.

    Attributes:
        ids: int64 [1, n] question.
        answer: int64 [m], the tokens that must follow.
        span: first token of the fact in the prompt, and the one behind it.
        depth: of the fact.
    """

    ids: torch.Tensor
    answer: torch.Tensor
    span: tuple[int, int]
    depth: float


@dataclass(frozen=True)
class Prompt:
    """ids: int64 [1, N], of which every question can be asked."""

    task: str
    ids: torch.Tensor
    questions: list[Question]


def passkey(depth: float, draw: random.Random) -> list[Fact]:
    """One fact with a random number of five digits."""
    number = draw.randrange(10_000, 100_000)
    sentence = f"\n\nThe pass key is {number}. Remember it: {number} is the pass key.\n\n"
    return [Fact(sentence, "\n\nWhat is the pass key? The pass key is ", f"{number}", depth)]


def key_value(pairs: int, draw: random.Random) -> list[Fact]:
    """Facts of one form at evenly spread depths, with different keys and numbers."""
    numbers, keys = draw.sample(range(10_000, 100_000), pairs), draw.sample(KEYS, pairs)
    facts = []
    for i, (key, number) in enumerate(zip(keys, numbers, strict=True)):
        sentence = f"\n\nThe {key} code is {number}. Remember it: {number} is the {key} code.\n\n"
        question = f"\n\nWhat is the {key} code? The {key} code is "
        facts.append(Fact(sentence, question, f"{number}", i / max(1, pairs - 1)))
    return facts


def hide(
    task: str,
    tokenizer: "PreTrainedTokenizerBase",
    filler: torch.Tensor,
    facts: Sequence[Fact],
    first: int,
    last: int,
) -> Prompt:
    """Put facts into text, at ends of sentences where there is one near; the length stays that of the text.

    Args:
        filler: int64 [N] text, begun as the model wants it.
        facts: in order of depth.
        first, last: facts lie within these tokens of the prompt.

    Raises:
        TextError: no room for the facts, or a tokenizer that joins question and answer.
    """
    sentences = [tokenizer(fact.sentence, add_special_tokens=False)["input_ids"] for fact in facts]
    pieces: list[torch.Tensor] = []
    questions, used, end = [], 0, 0  # tokens of filler used, end of the prompt so far
    for fact, sentence in zip(facts, sentences, strict=True):
        wanted = first + round(fact.depth * (last - first - len(sentence)))
        low = max(first, end)
        if not low <= wanted <= last - len(sentence):
            raise TextError(
                f"expected room for {len(facts)} facts in tokens {first} .. {last}, got none at depth {fact.depth}"
            )
        start = _break_before(tokenizer, filler, wanted - end + used, low - end + used) + end - used
        pieces += [filler[used : used + start - end], torch.tensor(sentence)]
        used, end = used + start - end, start + len(sentence)
        questions.append(_question(tokenizer, fact, (start, end)))
    pieces.append(filler[used : used + len(filler) - end])
    return Prompt(task, torch.cat(pieces)[None], questions)


def prompts(
    tokenizer: "PreTrainedTokenizerBase", filler: torch.Tensor, first: int, last: int, seed: int, pairs: int = 5
) -> list[Prompt]:
    """A passkey prompt for each row of text, at depths from 0 to 1, and a key-value prompt for every second row.

    Args:
        filler: int64 [n, N] text.
        first, last: see `hide`.
        seed: of numbers and keys.
        pairs: facts of a key-value prompt.
    """
    made = []
    for i, row in enumerate(filler):
        draw = random.Random(f"{seed} {len(row)} {i}")
        depth = i / (len(filler) - 1) if len(filler) > 1 else 0.5
        made.append(hide("passkey", tokenizer, row, passkey(depth, draw), first, last))
        if i % 2 == 0:
            made.append(hide("key-value", tokenizer, row, key_value(pairs, draw), first, last))
    return made


def _break_before(tokenizer: "PreTrainedTokenizerBase", filler: torch.Tensor, at: int, low: int) -> int:
    """The last end of a sentence at or before token `at`, not before `low`; `at` if there is none near."""
    for i in range(at, max(low, at - _LOOK_BACK, 1) - 1, -1):
        if tokenizer.decode(filler[i - 1]).endswith((".", "\n")):
            return i
    return at


def _question(tokenizer: "PreTrainedTokenizerBase", fact: Fact, span: tuple[int, int]) -> Question:
    question = tokenizer(fact.question, add_special_tokens=False)["input_ids"]
    both = tokenizer(fact.question + fact.answer, add_special_tokens=False)["input_ids"]
    if both[: len(question)] != question:
        raise TextError(f"expected the tokens of {fact.question!r} to begin those of it and its answer")
    return Question(torch.tensor([question]), torch.tensor(both[len(question) :]), span, fact.depth)
