"""A model's own answers to held-out questions, beside those that people gave: ROUGE-L, and files for a judge."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import estimate
from benchmarks.subsets import Pool
from eval.chatbot.answers import row_id
from eval.chatbot.journal import Journal
from eval.chatbot.questions import Question, read_questions
from eval.chatbot.sampled import Settings, write_answers
from eval.examinee import UNLIMITED, Examinee
from eval.superni.metrics import rouge_l
from models import Model, Sampling, Tokenizer
from models.files import write_whole

NEW_TOKENS = 64
UNTRAINED = "untrained"


def write_questions(
    pools: Sequence[Pool], held_out: dict[str, np.ndarray], count: int, path: Path
) -> list[tuple[Question, str]]:
    """The first held-out questions of every set, with the answers of people; the questions are written as well."""
    records = [(pool.name, pool.records[place]) for pool in pools for place in held_out[pool.name][:count]]
    rows = [
        {"question_id": number, "text": record["input"], "category": name}
        for number, (name, record) in enumerate(records, 1)
    ]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return list(zip(read_questions(path), (record["output"] for _, record in records), strict=True))


def answer(model: Model, tokenizer: Tokenizer, questions: Sequence[tuple[Question, str]], path: Path) -> dict[str, Any]:
    """The most probable answer to every question, in a file, with its ROUGE-L against the reference and its words."""
    path.unlink(missing_ok=True)  # of a run that was stopped, which trained another model
    examinee = Examinee(
        tokenizer=tokenizer, architecture="llama", max_tokens=model.max_tokens or UNLIMITED, loaded=model, chat=True
    )
    settings = Settings(
        system=path.stem, max_new_tokens=NEW_TOKENS, sampling=Sampling(), seed=0, identity=path.stem, chat=True
    )
    asked = [question for question, _ in questions]
    requests = {question.id: settings.request(examinee, question) for question in asked}
    journal = Journal(path, key=row_id)
    try:
        write_answers(examinee, asked, requests, settings, "auto", journal, lambda known, total: None)
        journal.finish(question.id for question in asked)
        texts = {id: row["generation"] for id, row in journal.rows.items()}
    finally:
        journal.close()
    return {
        "rouge_l": [rouge_l(texts[question.id], [reference]) for question, reference in questions],
        "words": [len(texts[question.id].split()) for question, _ in questions],
    }


def summary(
    results: dict[str, Any], questions: Sequence[tuple[Question, str]], runs: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Mean ROUGE-L and length by what was learned, over seeds; intervals are over questions, drawn again in pairs."""
    plain = np.array(results[UNTRAINED]["rouge_l"])
    rows = []
    for name, found in {UNTRAINED: [UNTRAINED], **runs}.items():
        scores = np.mean([results[run]["rouge_l"] for run in found], axis=0)
        on = {
            category: round(
                float(np.mean([s for s, (q, _) in zip(scores, questions, strict=True) if q.category == category])), 3
            )
            for category in dict.fromkeys(question.category for question, _ in questions)
        }
        rows.append(
            {
                "learned": name,
                "rouge_l": asdict(estimate(lambda mean: mean, scores)),
                "above": asdict(estimate(lambda mean, base: mean - base, scores, plain)),
                "rouge_l_on": on,
                "words": float(np.mean([results[run]["words"] for run in found])),
            }
        )
    return rows
