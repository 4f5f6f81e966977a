"""The released ratings that may be shipped, written out as the files that they came in, but without texts."""

import json
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
