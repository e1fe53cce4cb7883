"""Text for calibration and evaluation: articles, a split by article, windows of tokens.

Splitting by article keeps evaluation text out of calibration: neighbouring windows of one article share names,
topic and phrases, so a split by window measures memory of the calibration text as well.
"""

import bz2
import html
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import torch

from tq_ao.embedded import package_folder
from tq_ao.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENWIKI = "enwiki"
_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_MIN_ARTICLE = 2000  # characters; shorter pages are stubs and redirects
_MIN_PIECE = 8192  # characters of a piece of a file without headings
_HEADING = re.compile(r"(?:\A|\n[ \t]*\n)(?=[ \t]*(?:=[ \t]+[^=\n]+=|#[ \t]+[^\n]+)[ \t]*\n[ \t]*\n)")


def articles(source: str | Path) -> list[str]:
    """Articles of a text source.

    Args:
        source: "enwiki", an excerpt of the English Wikipedia that comes with the gensim package (about 100 long
            articles, 2.6 million characters), or the path of a UTF-8 text file.  A file is cut at top-level headings
            that stand between blank lines: `= Title =` (as in WikiText) or `# Title` (Markdown).  A file without
            headings is cut at blank lines into pieces of at least 8192 characters; if that gives only one, at the ends
            of lines.

    Returns:
        Non-empty texts, in the order of the source.

    Raises:
        TextError: the source does not exist, is not UTF-8 text, or is empty.
    """
    if source == ENWIKI:
        return _enwiki()
    path = Path(source)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise TextError(f"text source {str(source)!r} {what}: give {ENWIKI!r} or the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise TextError(f"{path} is empty: calibration and evaluation need text, at least a few thousand words")
    parts = [part.strip() for part in _HEADING.split(text) if part.strip()]
    return parts if len(parts) > 1 else _pieces(text)


def split_articles(articles: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Disjoint halves (calibration, evaluation) of about equal length, by whole articles, drawn with `seed`.

    Raises:
        TextError: fewer than two articles.
    """
    if len(articles) < 2:
        raise TextError(
            f"expected at least 2 articles, to choose on some and measure on others, got {len(articles)}: separate "
            "them with headings ('= Title =' or '# Title' between blank lines), or give more text: without headings "
            f"lines are put together to articles of {_MIN_PIECE} characters or more"
        )
    halves: tuple[list[str], list[str]] = ([], [])
    size = [0, 0]
    for article in random.Random(seed).sample(articles, len(articles)):
        half = int(size[1] < size[0])
        halves[half].append(article)
        size[half] += len(article)
    return halves


def windows(tokenizer: "PreTrainedTokenizerBase", articles: list[str], length: int, count: int) -> torch.Tensor:
    """Windows of consecutive tokens, spread evenly over the articles.

    The articles are joined by blank lines and tokenised as one stream; windows do not overlap.  If the tokenizer
    begins texts with a BOS token, every window begins with one (models trained so are far off without).

    Returns:
        int64 [count, length].

    Raises:
        TextError: the articles are too short for `count` windows, or no window is asked for.
    """
    if length < 2 or count < 1:
        raise TextError(f"expected windows >= 1, of 2 tokens or more, got {count} of {length}; ask for more or longer")
    bos, stream = beginning(tokenizer), token_stream(tokenizer, articles)
    step = length - len(bos)
    available = len(stream) // step
    if available < count:
        raise TextError(
            f"expected text for {count} windows of {length} tokens, got {len(stream)} tokens, enough for {available}: "
            "give more text, or ask for fewer or shorter windows"
        )
    starts = [i * available // count * step for i in range(count)]
    return torch.tensor([bos + stream[start : start + step] for start in starts], dtype=torch.int64)


def beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token texts begin with, if the tokenizer gives them one."""
    adds = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id] if adds else []


def token_stream(tokenizer: "PreTrainedTokenizerBase", articles: list[str]) -> list[int]:
    """Tokens of the articles, one after the other, with a blank line behind each."""
    texts = [article + "\n\n" for article in articles]
    return [token for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for token in ids]


def _pieces(text: str) -> list[str]:
    """Cut at blank lines into pieces of at least _MIN_PIECE characters; a short rest joins the last piece.

    Text that is one piece by blank lines is cut at the ends of lines.
    """
    pieces = _cut(re.split(r"\n[ \t]*\n", text), "\n\n")
    return pieces if len(pieces) > 1 else _cut(text.strip().split("\n"), "\n")


def _cut(parts: list[str], between: str) -> list[str]:
    pieces: list[str] = []
    current = ""
    for part in parts:
        current = f"{current}{between}{part}" if current else part
        if len(current) >= _MIN_PIECE:
            pieces.append(current.strip())
            current = ""
    if current.strip():
        if pieces:
            pieces[-1] += between + current.strip()
        else:
            pieces.append(current.strip())
    return pieces


def _enwiki() -> list[str]:
    gensim = package_folder("gensim")
    if gensim is None:
        raise TextError(
            "text source 'enwiki' comes with the gensim package: pip install gensim (the extra `embedded` of tq_ao has "
            "it), or give a text file (--calibration)"
        )
    path = gensim / _DUMP
    if not path.is_file():
        raise TextError(
            f"this gensim has no {path.name}: pip install gensim==4.4.0, or give a text file (--calibration)"
        )
    found = []
    title = ""
    with bz2.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "text":
                text = clean_markup(element.text or "")
                if len(text) >= _MIN_ARTICLE:
                    found.append(f"{title}\n\n{text}")
                element.clear()
    return found


_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}")
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_RULES = [
    (re.compile(r"<!--.*?-->", re.S), ""),
    (re.compile(r"<ref[^<>]*/>", re.I), ""),
    (re.compile(r"<(ref|math|gallery|timeline|source|syntaxhighlight|code|pre)\b[^<>]*>.*?</\1>", re.S | re.I), ""),
]
_AFTER_RULES = [
    (re.compile(r"\[(?:https?|ftp)://\S+ ([^\]\n]*)\]"), r"\1"),
    (re.compile(r"\[?(?:https?|ftp)://[^\s\]]+\]?"), ""),
    (re.compile(r"<[^<>\n]+>"), ""),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"^[ \t]*=+[ \t]*(.*?)[ \t]*=+[ \t]*$", re.M), r"\n\1\n"),
    (re.compile(r"^[|!].*$", re.M), ""),
    (re.compile(r"^[*#:;]+[ \t]*", re.M), ""),
    (re.compile(r"\([\s,;]*\)"), ""),
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r" +([,.;:])"), r"\1"),
    (re.compile(r"\n\s*\n\s*"), "\n\n"),
]
_APPENDIX = re.compile(
    r"^==\s*(?:References|External links|See also|Notes|Further reading|Bibliography)\s*==", re.M | re.I
)


def clean_markup(text: str) -> str:
    """Plain prose of a page in wiki markup: no templates, tables, references, files, links or appendices."""
    appendix = _APPENDIX.search(text)
    text = html.unescape(text[: appendix.start()] if appendix else text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _until_stable(_INNERMOST_TEMPLATE, lambda match: "", text)
    text = _until_stable(_INNERMOST_LINK, _link_text, text)
    for pattern, replacement in _AFTER_RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def _until_stable(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace innermost matches until none is left: templates and links nest."""
    while True:
        text, count = pattern.subn(replace, text)
        if not count:
            return text


def _link_text(match: re.Match[str]) -> str:
    """The words a link shows; nothing for files, categories and other languages."""
    target, _, shown = match[1].partition("|")
    if ":" in target and not shown.strip():
        return ""
    if re.match(r"\s*:?(?:file|image|category)\s*:", target, re.I):
        return ""
    return shown.rpartition("|")[2] if shown else target
