import random

import pytest
import torch
from transformers import AutoTokenizer

from tq_ao.errors import TextError
from tq_ao.text import articles, clean_markup, split_articles, windows

WORDS = "the river ran below a stone bridge and nobody in town remembered who had built it".split()


def prose(random_source: random.Random, words: int) -> str:
    return " ".join(random_source.choice(WORDS) for _ in range(words))


@pytest.fixture
def words(seed):
    return random.Random(seed)


@pytest.fixture(scope="module")
def wikipedia():
    return articles("enwiki")


def test_enwiki_is_a_good_amount_of_clean_prose(wikipedia):
    assert len(wikipedia) > 80
    assert sum(map(len, wikipedia)) > 2_000_000
    joined = "\n".join(wikipedia)
    for markup in ("{{", "}}", "<ref", "'''", "[http", "align="):
        assert joined.count(markup) < 3, markup
    assert joined.count("[[") < 10
    assert sum(map(joined.count, "|<>{}")) < 200
    anarchism = next(a for a in wikipedia if a.startswith("Anarchism"))
    assert "political philosophy" in anarchism[:400]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''thin''", "Bold and thin"),
        ("see [[Cat|the cats]] and [[Dog]].", "see the cats and Dog."),
        ("a{{cite|x={{nested|y}}}}b", "ab"),
        ("a<ref name=x>no</ref>b<ref name=y />c", "abc"),
        ("[[File:a.jpg|thumb|a [[Cat]] sits]]text", "text"),
        ("[[Category:Animals]]text [[fr:Chat]]", "text"),
        ("== History ==\nlong ago", "History\n\nlong ago"),
        ("* one\n* two", "one\ntwo"),
        ("a [https://example.org name] b", "a name b"),
        ("{| class=x\n| cell\n|}after", "after"),
        ("fish &amp; chips<br/>", "fish & chips"),
        ("text\n== References ==\n* book", "text"),
    ],
)
def test_clean_markup(markup, text):
    assert clean_markup(markup) == text


@pytest.mark.parametrize("heading", [" = {} = ", "# {}"])
def test_file_is_cut_at_top_level_headings(tmp_path, words, heading):
    bodies = [prose(words, 30) + "\n\n = = Section = = \n\n## Part\n\n" + prose(words, 30) for _ in range(4)]
    text = "\n\n".join(f"{heading.format(f'Title {i}')}\n\n{body}" for i, body in enumerate(bodies))
    (tmp_path / "a.txt").write_text(text)
    found = articles(tmp_path / "a.txt")
    assert len(found) == 4
    assert all(body in article for body, article in zip(bodies, found, strict=True))


def test_file_without_headings_is_cut_at_blank_lines(tmp_path, words):
    paragraphs = [prose(words, 400) for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    found = articles(str(tmp_path / "a.txt"))
    assert len(found) > 3
    assert all(len(article) >= 8192 for article in found)
    assert "\n\n".join(found) == "\n\n".join(paragraphs)


def test_file_without_blank_lines_is_cut_at_the_ends_of_lines(tmp_path, words):
    lines = [prose(words, 60) for _ in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    found = articles(tmp_path / "a.txt")
    assert len(found) > 3 and all(len(article) >= 8192 for article in found)
    assert "\n".join(found) == "\n".join(lines), "without the mark that editors put before it"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b" \n\n ", "is empty"), (b"\xff\xfe\x00a", "UTF-8")],
)
def test_bad_files_are_one_line_errors(tmp_path, content, message):
    path = tmp_path / "calibration.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=message) as error:
        articles(path)
    assert "\n" not in str(error.value)
    with pytest.raises(TextError, match="not a file"):
        articles(tmp_path)


def test_split_is_by_article_balanced_and_seeded(words, seed):
    texts = [f"{i} {prose(words, words.randrange(50, 500))}" for i in range(40)]
    calibration, evaluation = split_articles(texts, seed)
    assert sorted(calibration + evaluation) == sorted(texts)
    sizes = [sum(map(len, half)) for half in (calibration, evaluation)]
    assert max(sizes) - min(sizes) <= max(map(len, texts))
    assert split_articles(texts, seed) == (calibration, evaluation)
    assert split_articles(texts, seed + 1) != (calibration, evaluation)
    with pytest.raises(TextError, match="at least 2 articles, .* got 1"):
        split_articles(texts[:1], seed)


def test_windows_of_a_tokenizer_without_bos(smollm2, wikipedia):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    few = wikipedia[:3]
    tokens = windows(tokenizer, few, length=100, count=7)
    assert tokens.shape == (7, 100)
    assert tokens.dtype == torch.int64
    stream = "".join(article + "\n\n" for article in few)
    decoded = [tokenizer.decode(row) for row in tokens]
    assert stream.startswith(decoded[0])
    starts = [stream.index(text.strip("�")) for text in decoded]
    assert starts == sorted(starts)
    assert starts[-1] > len(stream) / 2, "windows are spread over the text"


def test_windows_of_a_tokenizer_with_bos_begin_with_it(gemma3, wikipedia):
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    tokens = windows(tokenizer, wikipedia[:2], length=64, count=5)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (tokens[:, 1:] != tokenizer.bos_token_id).all()


def test_too_little_text_says_how_much_there_is(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with pytest.raises(TextError, match="text for 3 windows of 64 tokens, got .* enough for [01]:"):
        windows(tokenizer, ["only a few words"] * 5, length=64, count=3)
    for length, count in ((1, 1), (64, 0)):
        with pytest.raises(TextError, match=f"windows >= 1, of 2 tokens or more, got {count} of {length}"):
            windows(tokenizer, ["x"], length=length, count=count)
