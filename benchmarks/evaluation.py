"""What evaluation costs beside the model's own work: tournaments, metrics, and rows that questions share.

`python -m benchmarks.evaluation [--out FILE]` rates made-up matches in the numbers of the paper's three tournaments,
10,000 orders each; scores answers in the number of Super-NaturalInstructions' test set by ROUGE-L and exact match;
asks a small LLaMA multiple-choice questions with the four letters in one row and in a row each; and measures a text's
perplexity with a few positions' logits at a time against a whole batch's.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import models
from benchmarks.data import SMALL
from benchmarks.tables import finish
from benchmarks.timing import interleaved
from eval.answering import answer_all
from eval.chatbot.elo import elo, matches_of
from eval.chatbot.votes import Verdict
from eval.examinee import Examinee
from eval.likelihood import Likelihood
from eval.scoring import token_losses
from eval.superni.metrics import exact_match, rouge_l
from models.tokenizer import Tokenizer

# Systems, questions and matches of the paper's tournaments: GPT-4 on both benchmarks, people on the first.
TOURNAMENTS = {
    "vicuna, GPT-4": (8, 80, 4467),
    "vicuna, people": (8, 80, 2240),
    "open assistant, GPT-4": (7, 953, 38544),
}
ANSWERS = 11_900  # 119 tasks, 100 instances of each


def measure(scale: float, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """The tables; `scale` makes everything smaller, for trying out."""
    return {
        "tournaments": tournaments(scale),
        "metrics": metrics(round(ANSWERS * scale)),
        "questions": questions(max(2, round(64 * scale)), repeats),
        "windows": windows(max(1, round(16 * scale)), repeats),
    }


def tournaments(scale: float) -> list[dict[str, Any]]:
    """Seconds for the ratings of each tournament, with both intervals, and for all three."""
    rows: list[dict[str, Any]] = []
    for name, (systems, asked, count) in TOURNAMENTS.items():
        matches = matches_of(made_up_verdicts(systems, asked, round(count * scale)))
        begin = time.perf_counter()
        elo(matches, orderings=round(10_000 * scale))
        seconds = time.perf_counter() - begin
        rows.append({"tournament": name, "matches": len(matches.codes), "seconds": seconds})
    total = {name: sum(row[name] for row in rows) for name in ("matches", "seconds")}
    return [*rows, {"tournament": "all three", **total}]


def made_up_verdicts(systems: int, asked: int, count: int) -> list[Verdict]:
    """Verdicts of a judge who sees some difference between systems, some in the order, and many ties."""
    draw = np.random.default_rng(0)
    strength = draw.normal(0, 0.8, systems)
    verdicts = []
    for _ in range(count):
        first, second = draw.choice(systems, 2, replace=False)
        better = strength[first] - strength[second] + 0.3 + draw.logistic()
        score = 3 if abs(better) < 0.3 else 1 if better > 0 else 2
        verdicts.append(Verdict(str(draw.integers(asked)), f"s{first}", f"s{second}", score))
    return verdicts


def metrics(count: int) -> list[dict[str, Any]]:
    """Seconds for ROUGE-L and exact match of answers of some 20 words against one or two references."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(2000)]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 40)))

    pairs = [(text(), [text() for _ in range(draw.randint(1, 2))]) for _ in range(count)]
    rouge_l("load", ["load"])  # the package is read before the clock starts
    begin = time.perf_counter()
    for prediction, references in pairs:
        rouge_l(prediction, references)
        exact_match(prediction, references)
    return [{"metric": "ROUGE-L and exact match", "answers": count, "seconds": time.perf_counter() - begin}]


def questions(count: int, repeats: int) -> list[dict[str, Any]]:
    """Questions a second: the letters of each in one row, and in rows of their own."""
    who = examinee()
    draw = np.random.default_rng(1)
    contexts = [tuple(draw.integers(1, SMALL.vocab_size, 200).tolist()) for _ in range(count)]
    by_letter = [
        [Likelihood(context_ids=it, continuation_ids=(letter,), context="", continuation="") for it in contexts]
        for letter in range(4)
    ]
    ways = {
        "letters in one row": lambda: answer_all(who, [it for letter in by_letter for it in letter]),
        "a row for each letter": lambda: [answer_all(who, letter) for letter in by_letter],
    }
    times = interleaved(ways, repeats)
    return [{"rows": name, "tokens": 200, "questions_per_second": count / times[name].median} for name in ways]


def windows(count: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens a second of a perplexity, and against a plain product and torch's cross-entropy."""
    model = examinee().model
    assert isinstance(model, models.Llama)
    ids = torch.randint(1, SMALL.vocab_size, (count, 512), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def whole() -> None:
        logits = model(ids)[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")

    times = interleaved({"ours": lambda: token_losses(model, ids), "whole logits": whole}, repeats)
    return [{"losses": name, "tokens_per_second": ids.numel() / it.median} for name, it in times.items()]


def examinee() -> Examinee:
    """A small LLaMA with random weights; its tokenizer is never used."""
    torch.manual_seed(0)
    model = models.Llama(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return Examinee(tokenizer=Tokenizer.__new__(Tokenizer), architecture="llama", max_tokens=1024, loaded=model.eval())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="a smaller one is for trying out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the result; benchmarks/results/evaluation-cpu.json is kept")
    options = parser.parse_args(argv)
    tables = measure(options.scale, options.repeats)
    finish("evaluation", tables, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
