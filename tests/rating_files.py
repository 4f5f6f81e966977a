"""Files of ratings: small ones, and the released ones that may be shipped, which are without texts."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

COMPACT = json.loads((Path(__file__).parent / "data" / "chatbot" / "ratings.json").read_text())


def write_released(folder: Path, *names: str) -> list[Path]:
    """Write the named folders of ratings (all by default) into `folder`, and give their paths."""
    writers = {
        "vicuna-pairwise": lambda scores: pairwise(scores, "question_id"),
        "oa-pairwise": lambda scores: pairwise(scores, "message_id"),
        "vicuna-relative": relative,
        "ratings-human": human,
    }
    chosen = names or tuple(COMPACT)
    for name in chosen:
        (folder / name).mkdir(parents=True)
        for stem, content in COMPACT[name].items():
            rows = writers[name](content)
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            (folder / name / f"{stem}.jsonl").write_text(text)
    return [folder / name for name in chosen]


def pairwise(scores: str, key: str) -> list[dict]:
    prefix = "" if key == "question_id" else "m"
    return [
        {key: f"{prefix}{number}" if prefix else number, "reviewer_id": 1, "score": -1 if mark == "-" else int(mark)}
        for number, mark in enumerate(scores, 1)
    ]


def relative(content: dict) -> list[dict]:
    """Rows with ids that tell whose answers they are, as the released ones do."""
    first, second = content["answers"]
    return [
        {"question_id": number, "answer1_id": f"{first} {number}", "answer2_id": f"{second} {number}",
         "reviewer_id": 1, "score": [float(score) for score in pair.split()]}
        for number, pair in enumerate(content["scores"].split("  "), 1)
    ]  # fmt: skip


def human(votes: str) -> list[dict]:
    pairs = [item.split(":") for item in votes.split()]
    return [{"question_id": int(id), "text": "?", "score": int(score)} for id, scores in pairs for score in scores]


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rating(question=1, score: object = 1, **more):
    return {"question_id": question, "score": score, **more}


def voted(path, rows, schema="question_id TEXT, system_a TEXT, system_b TEXT, score INTEGER, rater TEXT, at TEXT"):
    with closing(sqlite3.connect(path)) as base:
        base.execute(f"CREATE TABLE votes ({schema})")
        base.executemany("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?)", [(*row, "2023-05-23") for row in rows])
        base.commit()
    return path
