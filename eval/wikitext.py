"""The harness's task `wikitext`: how probable a model finds whole articles, per word and per byte.

WikiText is stored in tokenized form, with spaces around punctuation and "@-@" for a hyphen within a word. The model
reads an article after rules have put it back into ordinary writing, but words and bytes are counted before that, in
the stored form, so that numbers can be compared between models of any tokenizer. An article that is longer than the
model takes at once is cut into windows (`eval.likelihood.rolling`) whose log-probabilities add up.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from eval.examinee import Examinee
from eval.likelihood import Likelihood, rolling
from eval.ratios import BITS, PERPLEXITY
from eval.request import Request
from eval.task import Document, Task


class Wikitext(Task):
    """Documents of one text, each scored whole."""

    version = 2  # the harness's
    output_type = "loglikelihood_rolling"
    metrics = {"word_perplexity": PERPLEXITY, "byte_perplexity": PERPLEXITY, "bits_per_byte": BITS}

    def __init__(self, name: str, alias: str, pages: Sequence[str], window: int, settings: dict[str, Any]) -> None:
        self.name, self.alias, self.window = name, alias, window
        self.documents = [{"page": page} for page in pages]
        self.settings = settings

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        windows: list[Likelihood] = rolling(examinee, detokenized(document["page"]), self.window)
        return [*windows]

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        total, page = math.fsum(answer[0] for answer in answers), document["page"]
        words = len(re.split(r"\s+", page))  # with the empty ones before and behind, as the harness counts
        size = len(page.encode("utf-8", "surrogatepass"))
        return {"word_perplexity": (total, words), "byte_perplexity": (total, size), "bits_per_byte": (total, size)}

    def target(self, document: Document) -> Any:
        return None

    def prompt(self, document: Document, examinee: Examinee) -> dict[str, Any]:
        return {"task": self.name, "input": detokenized(document["page"]), "output": None}


def articles(text: str) -> list[str]:
    """The pages of a raw WikiText file, cut as the data set `wikitext_document_level` was made.

    A line begins a page if it is a heading with one equals sign on either side, " = Title = "; those of sections have
    two or more. Lines before the first heading are a page too, unless they are blank. A page has no newline at its
    end but the file's own, and a text without headings is one page.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if is_title(line):
            pages.append([])
        pages[-1].append(line)
    whole = ["\n".join(lines) for lines in pages]
    return [page for page in whole if page.strip()]


def is_title(line: str) -> bool:
    """Does a line begin a page?

    >>> is_title(" = Title = "), is_title(" = = Section = = "), is_title("x = y")
    (True, False, False)
    """
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def rows(text: str) -> list[str]:
    """The rows of the data set `wikitext-2-raw-v1`: a line each with its newline, and nothing for a blank one."""
    return [line if line.strip() else "" for line in io.StringIO(text, newline="\n")]


# In this order; each is replaced wherever it stands.
BEFORE_BRACKETS = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
BRACKETS = ("()", "[]", "{}", '""', "''")
BEHIND_BRACKETS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),  # the Penn Treebank's sign for any number
    (" 's", "'s"),
)


def detokenized(page: str) -> str:
    """A page in ordinary writing, by the harness's rules, what they get wrong included.

    >>> detokenized(" = X = \\n A 3 @.@ 5 m ( 11 ft ) tall dog , the dogs ' best .")
    " = X =\\nA 3.5 m (11 ft) tall dog, the dogs' best ."
    """
    page = page.replace("s '", "s'")
    page = re.sub("/' [0-9]/", "/'[0-9]/", page)  # a slip of the harness's, slashes and all; published numbers have it
    for spaced, written in BEFORE_BRACKETS:
        page = page.replace(spaced, written)
    for opening, closing in BRACKETS:
        page = tightened(page, opening, closing)
    for spaced, written in BEHIND_BRACKETS:
        page = page.replace(spaced, written)
    return page


def tightened(text: str, opening: str, closing: str) -> str:
    """Take the white space away just inside each pair of marks; a pair ends at the first closing one.

    >>> tightened("( a ( b ) c )", "(", ")")
    '(a ( b) c )'
    """
    parts, done = [], 0
    while (begin := text.find(opening, done)) >= 0 and (end := text.find(closing, begin + 1)) >= 0:
        parts += [text[done:begin], opening, text[begin + 1 : end].strip(), closing]
        done = end + 1
    return "".join([*parts, text[done:]])
