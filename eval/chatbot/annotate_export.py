"""Human votes in the layout of the released human ratings: a file for each ordered pair of systems, a row a vote.

    answer_bard-vs-answer_gpt35-human-reviewer_threeclass.jsonl
    {"question_id":1,"text":"How can I improve my time management skills?","score":1}

The system that a file names first was shown as A. Raters' names stay behind.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.chatbot.annotate_votes import Vote
from eval.chatbot.questions import Question
from models import DataError
from models.files import write_whole


def export(votes: Iterable[Vote], questions: Sequence[Question], directory: Path) -> list[Path]:
    """Write the files, rows in the order of the questions; old ones of the same names are replaced."""
    place = {question.id: number for number, question in enumerate(questions)}
    pairs: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        if vote.question_id not in place:
            raise DataError(f"a vote is on question {vote.question_id}, which is none of the questions given")
        pairs.setdefault((vote.system_a, vote.system_b), []).append(vote)
    files: dict[Path, str] = {}
    for (a, b), cast in sorted(pairs.items()):
        path = directory / f"{file_name(a)}-vs-{file_name(b)}-human-reviewer_threeclass.jsonl"
        if path in files:
            raise DataError(f"two pairs of systems would be written to {path}; rename the systems")
        rows = sorted(cast, key=lambda vote: place[vote.question_id])  # stable: the earlier vote stays first
        files[path] = "".join(f"{row(vote, questions[place[vote.question_id]])}\n" for vote in rows)
    for path, content in files.items():
        write_whole(path, content)
    return list(files)


def row(vote: Vote, question: Question) -> str:
    id = vote.question_id
    released = {
        question.key: int(id) if re.fullmatch("0|[1-9][0-9]{0,17}", id) else id,
        "text": question.text,
        "score": vote.score,
    }
    return json.dumps(released, ensure_ascii=False, separators=(",", ":"))


def file_name(system: str) -> str:
    """A system's name as a part of a file's.

    >>> file_name("../llama 7b")
    '.._llama 7b'
    """
    return re.sub(r"[/\\]", "_", system)
