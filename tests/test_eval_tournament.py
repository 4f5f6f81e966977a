"""`qlora tournament`: one command reads all layouts, prints tables, and writes files that say the same."""

import csv
import json
import re

import pytest
from scipy import stats

import qlora
from tests.rating_files import rating, voted, write_released, written

FEW = ["--orderings", "200", "--resamples", "50"]


def tournament(capsys, *arguments, code=0):
    """The report of the command, and what it says to a person."""
    assert qlora.main(["tournament", *map(str, arguments), "--json"]) == code
    said = capsys.readouterr()
    return (json.loads(said.out, parse_constant=pytest.fail) if said.out else {}), said.err


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The report on all released layouts, and the folder that it was written to."""
    folder = tmp_path_factory.mktemp("tournament")
    write_released(folder / "ratings")
    assert qlora.main(["tournament", str(folder / "ratings"), *FEW, "--out", str(folder / "out")]) == 0
    return json.loads((folder / "out" / "tournament.json").read_text()), folder / "out"


def test_one_command_reads_all_layouts(everything):
    report, _ = everything
    found = {label: (each["matches"], each["votes"], each["unparsed"]) for label, each in report["tournaments"].items()}
    assert found == {
        "oa-pairwise": (919, 953, 34),
        "ratings-human": (560, 1680, 0),
        "vicuna-pairwise": (4467, 4480, 13),
    }
    assert [each["system"] for each in report["tournaments"]["vicuna-pairwise"]["standings"]] == [
        "gpt-4", "guanaco-65b", "guanaco-33b", "vicuna-13b", "gpt-3.5", "guanaco-13b", "bard", "guanaco-7b",
    ]  # fmt: skip
    assert [round(each["mean"], 1) for each in report["relative"]["vicuna-relative"]] == [94.9, 94.8, 87.0, 69.4]
    assert len(report["unparsed"]) == 50
    assert all(re.fullmatch(r"/.*\.jsonl:\d+", note["where"]) for note in report["unparsed"])
    assert len(report["turned"]) == 4
    assert report["warnings"] == []
    (between,) = report["between"]
    assert (between["one"], between["other"]) == ("ratings-human", "vicuna-pairwise")
    assert len(between["systems"]) == len(between["without"]) == 8
    assert between["kappa"]["items"] == 560
    assert report["median_ranks"]["gpt-4"] == 1
    one, other = (
        {each["system"]: each["rating"] for each in report["tournaments"][between[side]]["standings"]}
        for side in ("one", "other")
    )
    for out, found in [(None, between), *between["without"].items()]:
        left = [[ratings[name] for name in sorted(one) if name != out] for ratings in (one, other)]
        assert found["kendall_tau"] == pytest.approx(stats.kendalltau(*left).statistic)
        assert found["spearman_rho"] == pytest.approx(stats.spearmanr(*left).statistic)


def test_the_wins_of_a_tournament_are_its_losses(everything):
    for each in everything[0]["tournaments"].values():
        standings = each["standings"]
        assert sum(row["wins"] for row in standings) == sum(row["losses"] for row in standings)
        assert sum(row["matches"] for row in standings) == 2 * each["matches"]
        assert [row["rank"] for row in standings] == list(range(1, len(standings) + 1))
        wins = {row["system"]: row["wins"] for row in standings}
        for system in wins:
            assert sum(net["wins"] for net in each["net"] if net["system"] == system) == wins[system]


def test_the_files_say_what_the_report_says(everything):
    report, out = everything
    with open(out / "elo-vicuna-pairwise.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    standings = report["tournaments"]["vicuna-pairwise"]["standings"]
    assert [(row["System"], float(row["Elo"])) for row in rows] == [(s["system"], s["rating"]) for s in standings]
    with open(out / "net-wins-vicuna-pairwise.csv", newline="") as file:
        net = {row["System"]: row for row in csv.DictReader(file)}
    assert float(net["guanaco-65b"]["guanaco-7b"]) == 0.8625
    assert net["bard"]["bard"] == ""
    text = (out / "tournament.md").read_text()
    for each in standings:
        assert f"| {each['rank']} | {each['system']} | {each['rating']:.1f} |" in text
    assert "| vicuna-13b | 91.2 | 98.7 | 94.9 | 4.5 |" in text
    assert "50 replies were not parsed: 50 of them have no score" in text
    assert {path.name for path in out.iterdir()} == {
        "tournament.json", "tournament.md", "ranks.csv", "agreement.csv", "relative-vicuna-relative.csv",
        "relative-vicuna-relative.png", "relative-vicuna-relative.svg",
        *(f"{what}-{label}.{ending}" for what in ("elo", "net-wins") for label in report["tournaments"]
          for ending in ("csv", "png", "svg")),
    }  # fmt: skip


def test_plots_name_the_systems_and_their_values(everything):
    _, out = everything
    ratings = (out / "elo-vicuna-pairwise.svg").read_text()
    assert "<!-- gpt-4 -->" in ratings
    assert "<!-- Elo -->" in ratings
    net = (out / "net-wins-vicuna-pairwise.svg").read_text()
    for said in ("guanaco-65b", "+0.86", "-0.86", "(wins - losses) / questions"):
        assert f"<!-- {said} -->" in net
    assert "<!-- percent of gpt-3.5 -->" in (out / "relative-vicuna-relative.svg").read_text()


def test_tables_are_printed_for_a_person(tmp_path, capsys):
    write_released(tmp_path, "vicuna-relative", "oa-pairwise")
    assert qlora.main(["tournament", str(tmp_path), *FEW]) == 0
    printed = capsys.readouterr().out
    assert "oa-pairwise: Elo from 919 matches, K = 4, 200 orders" in printed
    assert re.search(r"vicuna-13b +91.2 +98.7 +94.9 +4.5", printed)
    assert "37 replies were not parsed" in printed


def test_settings_change_what_they_say(tmp_path, capsys):
    (folder,) = write_released(tmp_path, "oa-pairwise")
    few, _ = tournament(capsys, folder, *FEW)
    again, _ = tournament(capsys, folder, *FEW)
    assert few == again
    fast, _ = tournament(capsys, folder, *FEW, "--k", "32")
    other, _ = tournament(capsys, folder, *FEW, "--seed", "1")
    ratings = [each["tournaments"]["oa-pairwise"]["standings"][0]["rating"] for each in (few, fast, other)]
    assert ratings[1] > ratings[0] != ratings[2]


def test_several_votes_are_one_match_unless_each_shall_be_one(tmp_path, capsys):
    written(tmp_path / "a-vs-b-human-reviewer.jsonl", [rating(1, score) for score in (1, 1, 2)])
    report, _ = tournament(capsys, tmp_path, *FEW)
    (found,) = report["tournaments"].values()
    assert (found["matches"], found["standings"][0]["wins"]) == (1, 1)
    report, _ = tournament(capsys, tmp_path, *FEW, "--no-majority")
    (found,) = report["tournaments"].values()
    assert (found["matches"], found["standings"][0]["wins"], found["standings"][0]["losses"]) == (3, 2, 1)


def test_votes_in_sqlite_make_a_tournament_with_agreement_of_raters(tmp_path, capsys):
    rows = [(str(q), *pair, 1 + q % 2, rater) for q in range(4) for pair in ("ab", "bc") for rater in ("ann", "bob")]
    report, _ = tournament(capsys, voted(tmp_path / "votes.sqlite", rows), *FEW)
    (found,) = report["tournaments"].values()
    assert (found["judge"], found["matches"], found["raters"]["kappa"]) == ("human", 8, 1)


def test_an_alias_and_a_reference_may_be_any_of_a_system_s_names(tmp_path, capsys):
    written(tmp_path / "answer_x-vs-answer-gpt35-gpt4-reviewer.jsonl", [rating(1, [5, 10])])
    report, _ = tournament(capsys, tmp_path, "--alias", "answer_x=mine", "--alias", "gpt-3.5=chat")
    assert report["systems"] == {"chat": ["answer-gpt35"], "mine": ["answer_x"]}
    _, said = tournament(capsys, tmp_path, "--reference", "y", code=2)
    assert "there is no 'y'" in said
    report, _ = tournament(capsys, tmp_path, "--reference", "answer_x")
    (share,) = next(iter(report["relative"].values()))
    assert (share["system"], share["reference"], share["mean"]) == ("gpt-3.5", "x", 200)


def test_files_of_answers_tell_whose_they_are(tmp_path, capsys):
    written(tmp_path / "r" / "mine-vs-other-gpt-4-reviewer.jsonl", [rating(1, 1, answer1_id="A", answer2_id="B")])
    answers = written(tmp_path / "mine.jsonl", [{"question_id": 1, "answer_id": "B", "text": "...", "model_id": "m"}])
    report, _ = tournament(capsys, tmp_path / "r", *FEW, "--answers", answers)
    (found,) = report["tournaments"].values()
    assert found["standings"][0]["system"] == "other"
    assert len(report["turned"]) == 1


# What is worth little is said to be


def test_a_tournament_without_a_decided_verdict_has_values_and_a_warning(tmp_path, capsys):
    written(tmp_path / "a-vs-b-gpt-4-reviewer.jsonl", [rating(q, 3) for q in range(5)])
    report, said = tournament(capsys, tmp_path, *FEW, "--out", tmp_path / "out")
    (found,) = report["tournaments"].values()
    assert [(each["rank"], each["rating"]) for each in found["standings"]] == [(1, 1000), (1, 1000)]
    assert found["position"]["share"] is None
    assert "has no decided verdict; every rating is the starting one" in " ".join(said.split())
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_verdicts_none_of_which_was_parsed_have_values_and_a_warning(tmp_path, capsys):
    written(tmp_path / "a-vs-b-gpt-4-reviewer.jsonl", [rating(q, -1) for q in range(2)])
    report, said = tournament(capsys, tmp_path, *FEW)
    (found,) = report["tournaments"].values()
    assert (found["matches"], [each["rating"] for each in found["standings"]]) == (0, [1000, 1000])
    assert "2 replies were not parsed" in said


def test_groups_that_never_met_are_said(tmp_path, capsys):
    for pair in ("a-vs-b", "c-vs-d", "d-vs-e"):
        written(tmp_path / f"{pair}.jsonl", [rating(q, 1) for q in range(3)])
    report, _ = tournament(capsys, tmp_path, *FEW)
    (warning,) = report["warnings"]
    assert "falls into groups that never met" in warning
    assert {"a, b", "c, d, e"} == set(warning.rpartition(": ")[2].split(" | "))


def test_constant_rankings_and_votes_are_said(tmp_path, capsys):
    for folder, score in (("one", 3), ("two", 1)):
        for pair in ("a-vs-b", "b-vs-c", "c-vs-a"):
            written(tmp_path / folder / f"{pair}-human-reviewer.jsonl", [rating(1, score)] * 2)
    report, _ = tournament(capsys, tmp_path, *FEW)
    (between,) = report["between"]
    assert (between["kendall_tau"], between["spearman_rho"]) == (0, 0)
    said = " ".join(report["warnings"])
    assert "a ranking is constant; its correlations are given as 0" in said
    assert "one: all votes are alike, so that kappa is not defined; it is given as 1" in said


# Hostile names and bad input


def test_names_are_drawn_and_printed_as_they_are(tmp_path, capsys):
    names = "[red]a|b\x1b[31m$x_1$", '=1+1, "q"\n', "ü 模型"
    rows = [rating(q, 1, system1=one, system2=two) for q in range(3) for one in names for two in names if one != two]
    written(tmp_path / "r.jsonl", rows)
    report, said = tournament(capsys, tmp_path / "r.jsonl", *FEW, "--out", tmp_path / "out")
    assert len(report["systems"]) == 3
    assert "\x1b" not in said
    assert "[red]a|b" in said
    text = (tmp_path / "out" / "tournament.md").read_text()
    assert r"[red]a\|b" in text
    assert "\x1b" not in text


def test_folders_whose_names_are_alike_in_files_overwrite_nothing(tmp_path, capsys):
    for folder in ("a b", "a-b"):
        written(tmp_path / folder / "x-vs-y-gpt-4-reviewer.jsonl", [rating()])
    tournament(capsys, tmp_path, *FEW, "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("elo-*.csv")} == {"elo-a-b.csv", "elo-a-b+.csv"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "there are no ratings"),
        (["nowhere"], 3, "nowhere does not exist"),
        (["r.jsonl"], 3, "r.jsonl:1: score is 9"),
        (["r.jsonl", "--k", "0"], 2, "k is 0.0; it must be"),
        (["r.jsonl", "--k", "nan"], 2, "k is nan; it must be"),
        (["r.jsonl", "--orderings", "0"], 2, "orderings is 0; it must be at least 1"),
        (["r.jsonl", "--alias", "x"], 2, "NAME=SHORT"),
        (["r.jsonl", "--out", "r.jsonl"], 2, "r.jsonl is no folder"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(tmp_path, capsys, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "r.jsonl", [rating(1, 9, system1="a", system2="b")])
    assert qlora.main(["tournament", *arguments]) == code
    assert said in " ".join(capsys.readouterr().err.split())
