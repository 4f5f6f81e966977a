"""Three ways to ask MMLU's questions, which give different numbers and therefore have names.

`harness` is the lm-evaluation-harness, `hendrycks` the code that the benchmark was published with, and `qlora` what
the paper's training script tracks. They differ in how a prompt is written, in what becomes of one that is too long,
and in how questions become one number. In all of them the answer is the most probable of " A", " B", " C" and " D",
each with the ids that it has in the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LETTERS = ("A", "B", "C", "D")
SHOTS = 5  # solved questions that the benchmark has for each subject, and the number that the paper reports


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One of the three ways."""

    spaces: int
    """Between "about" and the subject: the original script formats the subject with a space of its own."""
    strip: bool
    """White space around a question is taken off."""
    drops: bool
    """Of a prompt that is too long, solved questions are left out, the last one first."""
    keep: Literal["end", "start"]
    """What is kept of a prompt that is too long even so."""
    tokens: int | None
    """The most tokens of a prompt, where that is not what the model takes."""
    split: str
    """Where the questions come from, if nobody says."""
    macro: bool
    """The score of several subjects is the mean of theirs, not that over all questions."""
    version: float | None
    """Of the score of several subjects, in the harness."""
    loss: bool
    """The answer's loss is measured too, with the end-of-text token that training puts behind it."""


PROTOCOLS = {
    "harness": Protocol(
        spaces=1, strip=True, drops=False, keep="end", tokens=None, split="test", macro=False, version=2, loss=False
    ),
    "hendrycks": Protocol(
        spaces=2, strip=False, drops=True, keep="end", tokens=None, split="test", macro=False, version=None, loss=False
    ),
    # The paper's files of prompts were cut to 2,048 tokens when they were made; its script cuts again, on the right.
    "qlora": Protocol(
        spaces=2, strip=False, drops=True, keep="start", tokens=2048, split="val", macro=True, version=None, loss=True
    ),
}


def header(subject: str, protocol: Protocol) -> str:
    """What stands above the questions.

    >>> header("us_foreign_policy", PROTOCOLS["hendrycks"])
    'The following are multiple choice questions (with answers) about  us foreign policy.\\n\\n'
    """
    about = " " * protocol.spaces + subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about{about}.\n\n"


def posed(question: dict[str, Any], protocol: Protocol) -> str:
    """A question with its choices, up to where the answer's letter comes."""
    text = question["question"].strip() if protocol.strip else question["question"]
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question["choices"], strict=True))
    return f"{text}{choices}\nAnswer:"


def solved(question: dict[str, Any], protocol: Protocol) -> str:
    """A question with its answer, as it stands before the one that is asked."""
    return f"{posed(question, protocol)} {LETTERS[question['answer']]}\n\n"


def written(
    question: dict[str, Any],
    shots: Sequence[dict[str, Any]],
    protocol: Protocol,
    fits: Callable[[str], bool],
) -> str:
    """The whole prompt. `fits` tells whether a text is short enough; a protocol that drops shots asks it."""
    above, asked = header(question["subject"], protocol), posed(question, protocol)
    examples = [solved(shot, protocol) for shot in shots]
    while True:
        prompt = above + "".join(examples) + asked
        if not (examples and protocol.drops) or fits(prompt):
            return prompt
        examples.pop()
