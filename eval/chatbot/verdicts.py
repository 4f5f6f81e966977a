"""What a judge's reply decides, read as the paper's released scripts read it.

A three-class reply explains first and ends with a line that is 1, 2 or 3 alone. A relative reply begins with a line
of two scores out of ten. Whatever else a reply says is not guessed at: "Best answer: 2" stays unparsed, so that the
verdicts are those the paper counted.
"""

import re

UNPARSED = -1
"""The stored score of a reply that decides nothing; a relative reply stores two of them."""
FIRST, SECOND, TIE = 1, 2, 3
"""The verdicts: the answer shown first is better, the one shown second is, or they are equivalent."""

TWO_SCORES = re.compile(r"(\d+(?:\.\d*)?)[\s,]+(\d+(?:\.\d*)?)", re.ASCII)


def parse_threeclass(text: str) -> int:
    """The number alone on the last line of a pairwise reply: 1, 2, 3, or -1 if there is none.

    >>> parse_threeclass("Both are fine.\\n\\n3"), parse_threeclass("Best answer: 2")
    (3, -1)
    """
    last = text.strip().rpartition("\n")[2].strip()
    return int(last) if last in ("1", "2", "3") else UNPARSED


def parse_relative(text: str) -> tuple[float, float] | None:
    """The two scores alone on the first line of a relative reply, first answer first, or None.

    >>> parse_relative("8.5 9\\nAssistant 2 ..."), parse_relative("First, I will solve the problem:")
    ((8.5, 9.0), None)
    """
    found = TWO_SCORES.fullmatch(text.strip().partition("\n")[0].strip())
    return (float(found[1]), float(found[2])) if found else None
