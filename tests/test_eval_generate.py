"""`qlora generate --questions`: answers that are each question's own, in the released layout, and resumable."""

import json

import pytest
import torch

import models
import qlora
from eval.chatbot.answers import read_answers, short_id
from eval.chatbot.questions import read_questions
from eval.chatbot.sampled import Settings
from eval.examinee import Examinee
from eval.generate import NUCLEUS, GenerateOptions, SamplingOptions
from eval.generation import Generate, generation
from models import Sampling
from models.writing import answer
from tests import tiny, tiny_t5

DIALOGUE = "### Human: Hi ### Assistant: Yes? ### Human: Why? ### Assistant:"
ROWS = [
    {"question_id": 1, "text": "How?", "category": "generic"},
    {"question_id": 2, "text": "Code {x}, which is a longer question?", "category": "coding"},
    {"question_id": 3, "text": "How?", "category": "generic"},
    {"message_id": "m-1", "text": DIALOGUE},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def generated(capsys, model, questions, out, *more, code=0):
    flags = ["--max-new-tokens", 12, "--load.dtype", "float32", "--load.device", "cpu", "--json"]
    command = ["generate", model, "--questions", questions, "--out", out, *flags, *more]
    assert qlora.main([str(it) for it in command]) == code
    told, err = capsys.readouterr()
    return json.loads(told) if code == 0 else err


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_come_in_the_questions_order_and_can_be_judged(model, questions, tmp_path, capsys):
    out = tmp_path / "my_model.jsonl"
    found = generated(capsys, model, questions, out)
    assert (found["answers"], found["answered"], found["cut"]) == (4, 4, 0)
    written = rows(out)
    assert [row.get("question_id", row.get("message_id")) for row in written] == [1, 2, 3, "m-1"]
    for row, question in zip(written, read_questions(questions), strict=True):
        assert (row["text"], row["category"], row["prompt"]) == (question.text, question.category, question.prompt)
        assert row["answer_id"] == short_id(row["generation"])
        assert row["generation"] == row["generation"].strip() != ""
    made = written[0]["metadata"]
    assert (made["temperature"], made["top_p"], made["max_new_tokens"], made["seed"]) == (0.7, 0.9, 12, 0)
    answers = read_answers(out)
    assert answers.system == written[0]["model_id"] == "my-model"
    assert answers.texts == {str(row.get("question_id", "m-1")): row["generation"] for row in written}
    assert written[0]["generation"] != written[2]["generation"]  # one text twice, but each has draws of its own


def test_an_answer_does_not_depend_on_batch_order_or_company(model, questions, tmp_path, capsys):
    generated(capsys, model, questions, tmp_path / "a.jsonl")
    generated(capsys, model, questions, tmp_path / "b.jsonl", "--batch-size", 1)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:0:-1]))
    generated(capsys, model, backwards, tmp_path / "c.jsonl")
    texts = [read_answers(tmp_path / f"{name}.jsonl").texts for name in "abc"]
    assert texts[0] == texts[1]
    assert texts[2] == {id: text for id, text in texts[0].items() if id != "1"}
    generated(capsys, model, questions, tmp_path / "d.jsonl", "--seed", 1)
    assert read_answers(tmp_path / "d.jsonl").texts != texts[0]


def test_a_killed_run_goes_on_with_what_is_missing(model, questions, tmp_path, capsys):
    generated(capsys, model, questions, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    out = tmp_path / "killed" / "whole.jsonl"
    out.parent.mkdir()
    out.write_bytes(lines[3] + lines[1] + lines[0][:40])
    assert generated(capsys, model, questions, out)["answered"] == 2
    assert out.read_bytes() == whole
    assert generated(capsys, model, questions, out)["answered"] == 0


def test_a_killed_process_has_kept_its_answers(model, questions, tmp_path, capsys, monkeypatch):
    """What is on disk after each batch is what a kill would leave."""
    answer_batch, seen = Generate.answer.__func__, []

    def watched(cls, examinee, batch):
        seen.append(len(rows(out)) if out.exists() else 0)
        return answer_batch(cls, examinee, batch)

    monkeypatch.setattr(Generate, "answer", classmethod(watched))
    out = tmp_path / "a.jsonl"
    generated(capsys, model, questions, out, "--batch-size", 1)
    assert seen == [0, 1, 2, 3]


def test_answers_made_otherwise_are_not_mixed_in(model, questions, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    generated(capsys, model, questions, out, "--limit", 2)
    err = generated(capsys, model, questions, out, "--sampling.temperature", 0, code=3)
    assert "made with temperature 0.7, and now it is 0.0; name another place, or remove the file" in err
    other = tiny_t5.checkpoint(tmp_path / "t5", **tiny_t5.V1_1)
    assert "made with model" in generated(capsys, other, questions, out, code=3)
    assert generated(capsys, model, questions, out)["answered"] == 2


def test_greedy_answers_are_the_models_own_in_either_form(model, questions, tmp_path, capsys):
    generated(capsys, model, questions, tmp_path / "plain.jsonl", "--sampling.temperature", 0)
    generated(capsys, model, questions, tmp_path / "chat.jsonl", "--sampling.temperature", 0, "--chat")
    loaded, tokenizer = models.load(model, dtype=torch.float32), models.load_tokenizer(model)
    for question, plain, chat in zip(
        read_questions(questions), rows(tmp_path / "plain.jsonl"), rows(tmp_path / "chat.jsonl"), strict=True
    ):
        ids = tokenizer.encode(question.prompt)
        assert plain["generation"] == "".join(answer(loaded, tokenizer, ids, 12)).strip()
        ids, _ = models.render_chat(tokenizer, question.messages, add_generation_prompt=True)
        assert chat["generation"] == "".join(answer(loaded, tokenizer, ids, 12)).strip()
        assert chat["prompt"] == tokenizer.decode(ids, skip_special=False)
    assert rows(tmp_path / "chat.jsonl")[3]["prompt"].count("<|im_start|>user\n") == 2


def test_a_t5_answers_too_but_not_in_a_chat(questions, tmp_path, capsys):
    path = tiny_t5.checkpoint(tmp_path / "t5", **tiny_t5.V1_1)
    assert generated(capsys, path, questions, tmp_path / "a.jsonl")["answered"] == 4
    assert "chat needs a causal language model" in generated(
        capsys, path, questions, tmp_path / "b.jsonl", "--chat", code=2
    )
    assert not (tmp_path / "b.jsonl").exists()


def test_what_the_model_writes_in_the_users_name_is_no_answer(model, questions):
    loaded, tokenizer = models.load(model, dtype=torch.float32), models.load_tokenizer(model)
    examinee = Examinee(tokenizer=tokenizer, architecture="llama", max_tokens=256, loaded=loaded)
    how = Settings(system="a", max_new_tokens=9, sampling=NUCLEUS, seed=0, identity="b", chat=False)
    assert how.request(examinee, read_questions(questions)[0]).stop == ("### Human:",)
    free = generation(examinee, "It is", 12)
    [[text]] = Generate.answer(examinee, [[free]])
    mark = text[4:6]
    [[cut]] = Generate.answer(examinee, [[generation(examinee, "It is", 12, (mark,))]])
    assert cut == text[: text.index(mark)]


def test_sampled_requests_share_a_batch(model, monkeypatch):
    loaded, tokenizer = models.load(model, dtype=torch.float32), models.load_tokenizer(model)
    examinee = Examinee(tokenizer=tokenizer, architecture="llama", max_tokens=256, loaded=loaded)
    asked = [
        generation(examinee, f"It is {n}", 9, sampling=NUCLEUS, seed=seed) for n, seed in ((1, 5), (22, 6), (3, 5))
    ]
    alone = [Generate.answer(examinee, [[it]])[0][0] for it in asked]
    import eval.generation as module

    calls, real = [], module.stream
    monkeypatch.setattr(module, "stream", lambda *given, **how: calls.append(how["seed"]) or real(*given, **how))
    assert Generate.answer(examinee, [[it] for it in asked]) == [[text] for text in alone]
    assert calls == [[5, 6, 5]]


def test_settings_that_are_not_given_are_the_modes_own():
    assert SamplingOptions().over(Sampling()) == Sampling()
    assert SamplingOptions().over(NUCLEUS) == Sampling(temperature=0.7, top_p=0.9)
    assert SamplingOptions(temperature=0.0, top_k=3).over(NUCLEUS) == Sampling(temperature=0.0, top_k=3, top_p=0.9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either a prompt or a file of questions"),
        ({"prompt": "a", "questions": "q", "out": "o"}, "give either a prompt or a file of questions"),
        ({"questions": "q"}, "out is not given"),
        ({"questions": "q", "out": "o", "num_beams": 2}, "num_beams is 2; questions are answered without a search"),
        ({"prompt": "a", "out": "o"}, "out and limit go with questions"),
        ({"prompt": "a", "limit": 3}, "out and limit go with questions"),
        ({"questions": "q", "out": "o", "limit": 0}, "limit is 0; it must be at least 1"),
        ({"questions": "q", "out": "o", "batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        GenerateOptions(target="m", **given)
    with pytest.raises(ValueError, match=r"top_p is 0\.0"):
        SamplingOptions(top_p=0.0)


def test_an_empty_prompt_is_gone_on_from_the_id_that_begins_a_text(model, capsys):
    flags = ["--max-new-tokens", "6", "--load.dtype", "float32", "--load.device", "cpu", "--json"]
    assert qlora.main(["generate", str(model), "--prompt", "", *flags]) == 0
    loaded, tokenizer = models.load(model, dtype=torch.float32), models.load_tokenizer(model)
    assert tokenizer.bos_token_id is not None
    expected = "".join(answer(loaded, tokenizer, [tokenizer.bos_token_id], 6))
    assert json.loads(capsys.readouterr().out)["text"].strip() == expected.strip() != ""


def test_a_window_too_small_for_the_answer_is_refused(model, questions, tmp_path, capsys):
    err = generated(capsys, model, questions, tmp_path / "a.jsonl", "--max-new-tokens", 256, code=3)
    assert "256 tokens are to be written, but the model takes 256 at once" in err


def test_a_question_too_long_for_the_model_loses_its_beginning_and_says_so(model, tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"question_id": 2, "text": "Why? " * 200}))
    assert generated(capsys, model, path, tmp_path / "a.jsonl")["cut"] == 1
    short, long = rows(tmp_path / "a.jsonl")
    assert "cut" not in short["metadata"]
    tokenizer = models.load_tokenizer(model)
    assert long["metadata"]["cut"] == len(tokenizer.encode(long["prompt"])) - (256 - 12)
