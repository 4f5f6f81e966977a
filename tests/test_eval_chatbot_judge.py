"""`qlora judge`: who is shown to the judge and in which order, what is kept, and that nothing is asked twice."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import eval.chatbot.endpoint as endpoint
import models
import qlora
from eval.chatbot.answers import short_id
from models.writing import answer as written
from tests import tiny
from tests.chat_server import Answer, chat_server

SYSTEMS = ("good", "fair", "poor")
QUESTIONS = ("How?", "Code {x}?", "Why?")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", (0.01, 0.02))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def files(tmp_path):
    """Three systems' answers, which end with how good they are, and the questions."""
    rows = [
        {"question_id": n, "text": text, "category": "coding" if n == 2 else "generic"}
        for n, text in enumerate(QUESTIONS, 1)
    ]
    write(tmp_path / "questions.jsonl", rows)
    for rank, system in enumerate(SYSTEMS):
        answers = [row | {"generation": f"{system} {{answer_2}} to {row['question_id']} #{rank}"} for row in rows]
        write(tmp_path / f"{system}.jsonl", answers)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fair_judge(request, number):
    """Prefers the lower number; between neighbours it sees a tie."""
    first, second = map(int, re.findall(r"#(\d)", request["messages"][-1]["content"]))
    verdict = 3 if abs(first - second) == 1 else 1 if first < second else 2
    return Answer(f"Let me see.\n\n{verdict}")


def arguments(folder, server, *more, systems=SYSTEMS, judge="gpt-4"):
    answers = [folder / f"{system}.jsonl" for system in systems]
    url = [] if server is None else ["--base-url", server.url]
    common = ["--questions", folder / "questions.jsonl", "--judge", judge, "--out", folder / "ratings"]
    return [str(it) for it in ["judge", *answers, *common, *url, *more]]


def judged(capsys, *given, code=0):
    assert qlora.main([*given, "--json"]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err


def test_every_pair_is_judged_in_both_orders_and_kept_in_the_released_layout(files, capsys):
    with chat_server(fair_judge) as server:
        found, err = judged(capsys, *arguments(files, server))
    names = {path.name for path in (files / "ratings").iterdir()}
    assert names == {f"{a}-vs-{b}-gpt-4-reviewer-threeclass.jsonl" for a in SYSTEMS for b in SYSTEMS if a != b}
    assert len(server.requests) == found["requests"] == 18
    [first, coding, _] = rows(files / "ratings" / "good-vs-poor-gpt-4-reviewer-threeclass.jsonl")
    assert first == {
        "review_id": first["review_id"],
        "question_id": 1,
        "answer1_id": short_id("good {answer_2} to 1 #0"),
        "answer2_id": short_id("poor {answer_2} to 1 #2"),
        "reviewer_id": 1,
        "metadata": {
            "model": "gpt-4",
            "temperature": 0.2,
            "max_tokens": 1024,
            "prompts": first["metadata"]["prompts"],
            "finish_reason": "stop",
            "served_by": "tester-1",
            "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        },
        "text": "Let me see.\n\n1",
        "score": 1,
        "system1": "good",
        "system2": "poor",
    }
    assert coding["reviewer_id"] == 2
    assert [row["score"] for row in rows(files / "ratings" / "poor-vs-good-gpt-4-reviewer-threeclass.jsonl")] == [
        2,
        2,
        2,
    ]
    assert len({row["review_id"] for path in (files / "ratings").iterdir() for row in rows(path)}) == 18
    [asked] = [
        p for p in server.prompts if "poor {answer_2} to 2 #2" in p.split("[The End of Assistant 1")[0] and "good" in p
    ]
    assert asked.startswith("[Question]\nCode {x}?\n\n[The Start of Assistant 1's Answer]\npoor {answer_2} to 2 #2\n\n")
    assert "evaluate the coding abilities" in asked
    counted = {(it["first"], it["second"]): (it["wins"], it["ties"], it["losses"]) for it in found["pairs"]}
    assert counted["good", "poor"] == (3, 0, 0)
    assert counted["poor", "good"] == (0, 0, 3)
    assert counted["good", "fair"] == counted["fair", "good"] == (0, 3, 0)
    assert found["usage"] == {"prompt_tokens": 126, "completion_tokens": 36, "total_tokens": 162}
    assert found["unparsed"] == 0
    assert re.search(r"poor +good +0 +0 +3 +0\n", err)


def test_equal_scores_are_a_tie(files, capsys):
    replies = iter(("8 8", "7 9.5", "9 2"))
    with chat_server(lambda request, number: Answer(next(replies, "5 5"))) as server:
        how = ("--mode", "relative", "--reference", "fair", "--concurrency", "1")
        found, _ = judged(capsys, *arguments(files, server, *how, systems=SYSTEMS[:2]))
    first, second = found["pairs"]
    assert [(it["wins"], it["ties"], it["losses"]) for it in (first, second)] == [(1, 1, 1), (0, 3, 0)]
    assert (first["first_score"], first["second_score"]) == (8.0, 6.5)


def test_relative_scores_are_asked_against_the_reference_alone(files, capsys):
    with chat_server(lambda request, number: Answer("8 9.5\nBecause.")) as server:
        found, err = judged(capsys, *arguments(files, server, "--mode", "relative", "--reference", "fair"))
    pairs = [("good", "fair"), ("fair", "good"), ("fair", "poor"), ("poor", "fair")]
    assert {path.name for path in (files / "ratings").iterdir()} == {
        f"{a}-vs-{b}-gpt-4-reviewer.jsonl" for a, b in pairs
    }
    assert rows(files / "ratings" / "poor-vs-fair-gpt-4-reviewer.jsonl")[0]["score"] == [8.0, 9.5]
    assert all("on a scale of 1 to 10" in p or "scale of 1-10" in p for p in server.prompts)
    assert [(it["losses"], it["first_score"], it["second_score"]) for it in found["pairs"]] == [(3, 8.0, 9.5)] * 4
    assert "8.00 : 9.50" in err


def test_what_was_answered_is_not_asked_again(files, capsys):
    with chat_server(fair_judge) as server:
        judged(capsys, *arguments(files, server, systems=SYSTEMS[:2]))
        before = {path.name: path.read_bytes() for path in (files / "ratings").iterdir()}
        found, _ = judged(capsys, *arguments(files, server))
        assert len(server.requests) == 18
        assert len(set(server.prompts)) == 18
    assert found["requests"] == 12
    assert all((files / "ratings" / name).read_bytes() == content for name, content in before.items())


def test_a_killed_run_goes_on_without_asking_again_what_was_answered(files, capsys):
    free = threading.Event()
    held = []

    def answer(request, number):
        if number >= 7 and not free.is_set():
            held.append(request["messages"][-1]["content"])
            free.wait(60)
        return fair_judge(request, number)

    with chat_server(answer) as server:
        command = arguments(files, server, "--concurrency", 2)
        process = subprocess.Popen([sys.executable, "-m", "qlora", *command], cwd=Path(qlora.__file__).parent)
        deadline = time.monotonic() + 60
        while (kept(files) < 7 or len(held) < 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kept(files) == 7
        free.set()
        [cut] = [path for path in (files / "ratings").iterdir() if 0 < path.read_bytes().count(b"\n") < 3]
        with open(cut, "ab") as file:
            file.write(b'{"review_id": "half')
        found, _ = judged(capsys, *command)
    assert found["requests"] == 18 - 7
    assert len(server.prompts) == 18 + 2
    asked_twice = {prompt for prompt in server.prompts if server.prompts.count(prompt) > 1}
    assert asked_twice == set(held)
    assert kept(files) == 18
    for path in (files / "ratings").iterdir():
        assert [row["question_id"] for row in rows(path)] == [1, 2, 3]


def kept(folder):
    return sum(path.read_bytes().count(b"\n") for path in (folder / "ratings").glob("*.jsonl"))


def test_replies_before_a_refusal_are_kept(files, capsys):
    def answer(request, number):
        return (
            Answer(status=401, body={"error": {"message": "expired"}}) if number == 5 else fair_judge(request, number)
        )

    with chat_server(answer) as server:
        _, err = judged(capsys, *arguments(files, server, "--concurrency", "1"), code=2)
    assert "answers 401: expired; replies so far are kept" in err
    assert kept(files) == 5
    assert all(path.stat().st_size for path in (files / "ratings").iterdir())  # no file for a pair without ratings


def test_replies_that_decide_nothing_are_kept_counted_and_asked_again_only_if_told(files, capsys):
    def answer(request, number):
        return Answer(f"I cannot say ({number}).") if number in (0, 1, 2, 6) else fair_judge(request, number)

    with chat_server(answer) as server:
        command = arguments(files, server, "--concurrency", "1", systems=SYSTEMS[:2])
        found, err = judged(capsys, *command)
        assert found["unparsed"] == 3
        assert "3 replies decide nothing; --retry-unparsed asks for them again" in err
        path = files / "ratings" / "good-vs-fair-gpt-4-reviewer-threeclass.jsonl"
        assert [(row["text"], row["score"]) for row in rows(path)] == [(f"I cannot say ({n}).", -1) for n in range(3)]
        judged(capsys, *command)
        assert len(server.requests) == 6
        found, _ = judged(capsys, *command, "--retry-unparsed")
        assert len(server.requests) == 9
        assert found["unparsed"] == 1
        found, _ = judged(capsys, *command, "--retry-unparsed")
    assert len(server.requests) == 10
    assert found["unparsed"] == 0
    assert [row["score"] for row in rows(path)] == [3, 3, 3]
    earlier = [row["metadata"]["earlier"] for row in rows(path)]
    assert earlier == [["I cannot say (0).", "I cannot say (6)."], ["I cannot say (1)."], ["I cannot say (2)."]]


def test_relative_replies_that_decide_nothing_store_two_of_them(files, capsys):
    with chat_server(lambda request, number: Answer("First, I solve the problem.")) as server:
        command = arguments(files, server, "--mode", "relative", "--reference", "good", systems=SYSTEMS[:2])
        found, _ = judged(capsys, *command)
        assert found["unparsed"] == 6
        assert rows(files / "ratings" / "good-vs-fair-gpt-4-reviewer.jsonl")[0]["score"] == [-1, -1]
        found, _ = judged(capsys, *command, "--retry-unparsed")
    assert found["requests"] == 6


def test_ratings_made_otherwise_are_not_mixed_in(files, capsys):
    with chat_server(fair_judge) as server:
        command = arguments(files, server, systems=SYSTEMS[:2])
        judged(capsys, *command)
        _, err = judged(capsys, *command, "--temperature", "0", code=3)
        assert "were made with temperature 0.2, and now it is 0.0" in err
        answers = rows(files / "fair.jsonl")
        write(files / "fair.jsonl", [answers[0] | {"generation": "another #1"}, *answers[1:]])
        _, err = judged(capsys, *command, code=3)
        told = f"rates another answer to question 1 than {files / 'fair.jsonl'} holds"
        assert f"good-vs-fair-gpt-4-reviewer-threeclass.jsonl: {told}" in err
        command[1:3] = reversed(command[1:3])
        _, err = judged(capsys, *command, code=3)
        assert f"fair-vs-good-gpt-4-reviewer-threeclass.jsonl: {told}" in err
        assert len(server.requests) == 6


def test_one_run_at_a_time(files, capsys):
    from eval.chatbot.journal import Journal

    path = files / "ratings" / "fair-vs-good-gpt-4-reviewer-threeclass.jsonl"
    other = Journal(path, key=str)
    with chat_server(fair_judge) as server:
        _, err = judged(capsys, *arguments(files, server, systems=SYSTEMS[:2]), code=3)
    other.close()
    assert "another process is writing it" in err
    assert not server.requests


def test_a_dry_run_counts_and_leaves_nothing(files, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found, err = judged(capsys, *arguments(files, None, "--dry-run"))
    assert (found["requests"], found["rated"], found["completion_tokens_at_most"]) == (18, 0, 18 * 1024)
    assert 18 * 200 < found["prompt_tokens"] < 18 * 500
    assert "18 requests for 6 ordered pairs (0 ratings are there)" in " ".join(err.split())
    assert not list((files / "ratings").iterdir())
    with chat_server(fair_judge) as server:
        judged(capsys, *arguments(files, server, "--limit", "1"))
        found, _ = judged(capsys, *arguments(files, server, "--dry-run"))
    assert (found["requests"], found["rated"], len(server.requests)) == (12, 6, 6)


def test_answers_that_are_missing_are_refused_or_left_out(files, capsys):
    write(files / "poor.jsonl", rows(files / "poor.jsonl")[1:])
    with chat_server(fair_judge) as server:
        _, err = judged(capsys, *arguments(files, server), code=3)
        assert "poor.jsonl has no answer to 1 of 3 questions (1)" in err
        assert not server.requests
        found, err = judged(capsys, *arguments(files, server, "--skip-missing"))
    assert "1 questions lack an answer" in err
    assert sorted(it["ratings"] for it in found["pairs"]) == [2, 2, 2, 2, 3, 3]


def test_dialogues_are_judged_with_their_own_prompt_and_named_by_their_message(files, capsys):
    dialogue = "### Human: Hi ### Assistant: Yes? ### Human: Why? ### Assistant:"
    write(files / "questions.jsonl", [{"message_id": "m-1", "text": dialogue, "category": "generic"}])
    for rank, system in enumerate(SYSTEMS[:2]):
        write(files / f"{system}.jsonl", [{"message_id": "m-1", "generation": f"{system} #{rank}", "output": "x"}])
    with chat_server(fair_judge) as server:
        judged(capsys, *arguments(files, server, systems=SYSTEMS[:2]))
    [row] = rows(files / "ratings" / "good-vs-fair-gpt-4-reviewer-threeclass.jsonl")
    assert row["message_id"] == "m-1"
    assert "question_id" not in row
    assert server.prompts[0].startswith(f"[Question]\n{dialogue}\n\n")
    assert "If the question involves coding or mathematical reasoning" in server.prompts[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mode", "relative"], "reference and mode relative go together"),
        (["--reference", "good"], "reference and mode relative go together"),
        (["--mode", "relative", "--reference", "gold"], "reference: gold is none of the systems good, fair, poor"),
        (["--concurrency", "0"], "concurrency is 0; it must be at least 1"),
        (["--timeout", "0"], "timeout is 0.0; it must be above 0"),
        (["--temperature", "-1"], "temperature is -1.0; it must be 0 or more"),
        ([], "environment variable OPENAI_API_KEY must hold a key"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_asked(files, capsys, monkeypatch, more, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    _, err = judged(capsys, *arguments(files, None, *more), code=2)
    assert message in err
    assert not (files / "ratings").exists()


def test_a_judge_that_is_not_where_it_is_said_to_be_is_not_looked_for_at_an_endpoint(files, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    _, err = judged(capsys, *arguments(files, None, judge=f"runs{os.sep}missing"), code=2)
    assert f"there is no runs{os.sep}missing here; a model of an endpoint needs --base-url" in err


def test_a_model_here_judges_with_its_chat_form(files, capsys, tmp_path):
    path = tiny.checkpoint(tmp_path / "tiny-judge")
    template = {
        "prompt_id": 1,
        "system_prompt": "Be fair.",
        "prompt_template": "{question} 1: {answer_1} 2: {answer_2}",
        "category": "general",
    }
    write(files / "prompts.jsonl", [template])
    flags = ("--prompts", str(files / "prompts.jsonl"), "--load.dtype", "float32", "--load.device", "cpu")
    command = arguments(files, None, *flags, "--max-tokens", "9", "--temperature", "0", judge=path, systems=SYSTEMS[:2])
    found, _ = judged(capsys, *command)
    assert found["requests"] == 6
    [row, *_] = rows(files / "ratings" / "fair-vs-good-tiny-judge-reviewer-threeclass.jsonl")
    model, tokenizer = models.load(path, dtype=torch.float32), models.load_tokenizer(path)
    messages = [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": "How? 1: fair {answer_2} to 1 #1 2: good {answer_2} to 1 #0"},
    ]
    ids, _ = models.render_chat(tokenizer, messages, add_generation_prompt=True)
    assert row["text"] == "".join(written(model, tokenizer, ids, 9)) != ""
    assert row["score"] == -1
    assert row["metadata"]["usage"]["prompt_tokens"] == len(ids)
    found, _ = judged(capsys, *command)
    assert found["requests"] == 0
    found, _ = judged(capsys, *command, "--retry-unparsed")
    assert found["requests"] == 6
