"""ROUGE-L against the package and by hand, exact match as SQuAD's without dropping articles."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from eval.superni.metrics import compute_metrics, exact_match, normalize_answer, rouge_l

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None
WORDS = st.sampled_from(["the", "cat", "cats", "running", "runs", "ran", "Not-only", "42", "é", "ponies", " ", "."])
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # the cat are run / the cat run: 3 of 4 and 3 of 3 words
        ("The cats are running!", "the cat runs", 600 / 7),
        ("a b c d", "a c e", 400 / 7),  # the order counts: a c; 2 of 4 and 2 of 3
        ("c b a", "a b c", 100 / 3),
        ("cat", "cats", 100.0),
        ("ape", "apes", 100.0),
        ("his", "hi", 0.0),  # a word of three letters is not stemmed
        ("same", "same", 100.0),
        ("", "same", 0.0),
        ("same", "", 0.0),
        ("", "", 0.0),
        ("日本", "日本", 0.0),  # no letter a to z
    ],
)
def test_rouge_l_by_hand(prediction, reference, score):
    assert rouge_l(prediction, [reference]) == pytest.approx(score, abs=1e-9)


@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=4))
def test_rouge_l_is_the_packages_best_over_the_references(prediction, references):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = scorer.score_multi(references, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, references) == 100 * best


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with the package's own test pairs")
def test_rouge_l_is_the_packages_on_its_own_test_pairs():
    assert SHARED is not None
    folder = SHARED / "assets" / "data" / "rouge"
    targets, predictions = ((folder / f"{it}_large.txt").read_text().splitlines() for it in ("target", "prediction"))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert len(targets) == len(predictions) == 1000
    for target, prediction in zip(targets, predictions, strict=True):
        assert rouge_l(prediction, [target]) == 100 * scorer.score(target, prediction)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("The answer: yes.", ["no", "the answer yes"], 100.0),
        ("  Don't\n know ", ["dont know"], 100.0),
        ("the cat", ["cat"], 0.0),  # articles stay
        ("a cat", ["a  cat!"], 100.0),
        ("yes no", ["yesno"], 0.0),
        ("...", [""], 100.0),
        ("«yes»", ["yes"], 0.0),  # only ASCII's punctuation goes
    ],
)
def test_exact_match_leaves_case_punctuation_and_spaces_aside(prediction, references, score):
    assert exact_match(prediction, references) == score


def test_an_answer_is_normalized_as_in_squad_but_for_articles():
    assert normalize_answer("An  (old) Man's\tU.S. hat") == "an old mans us hat"


def test_means_are_over_all_answers_to_four_places():
    found = compute_metrics(["yes", "the cats are running", "no"], [["Yes."], ["the cat runs"], ["yes", "maybe"]])
    assert found == {"rougeL": round((100 + 600 / 7) / 3, 4), "exact_match": 33.3333}
    with pytest.raises(ValueError, match="shorter"):
        compute_metrics(["yes", "no"], [["yes"]])
