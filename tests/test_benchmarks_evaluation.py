"""The benchmark of evaluation measures what it says."""

import json

from benchmarks import evaluation
from eval.chatbot.elo import matches_of


def test_matches_are_as_many_as_the_papers():
    systems, asked, count = evaluation.TOURNAMENTS["vicuna, people"]
    matches = matches_of(evaluation.made_up_verdicts(systems, asked, count))
    assert (len(matches.systems), len(matches.codes), matches.questions.max() + 1) == (8, 2240, 80)


def test_every_figure_is_there(tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    assert evaluation.main(["--scale", "0.01", "--repeats", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [row["tournament"] for row in found["tournaments"]] == [*evaluation.TOURNAMENTS, "all three"]
    assert found["tournaments"][-1]["seconds"] == sum(row["seconds"] for row in found["tournaments"][:-1]) > 0
    assert found["metrics"][0]["answers"] == 119
    assert all(row["questions_per_second"] > 0 for row in found["questions"])
    assert all(row["tokens_per_second"] > 0 for row in found["windows"])
    assert "letters in one row" in capsys.readouterr().out
