"""MMLU: its files, its three protocols to the letter, and what counting says of a model that always answers B."""

import doctest
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from eval.answering import answer_all
from eval.evaluate import evaluate
from eval.examinee import Examinee
from eval.likelihood import Likelihood, in_one_row, likelihood
from eval.mmlu import protocols, subjects
from eval.mmlu.family import FAMILY
from eval.mmlu.subjects import GROUPS, NAMES, SUBJECTS, subjects_of
from eval.mmlu.tracking import Examination
from eval.task import Spec
from models.errors import ConfigError, DataError
from tests import tiny, tiny_mmlu

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None
REAL = Path(__file__).parent / "data" / "mmlu"
PLAIN = "The following are multiple choice questions (with answers) about anatomy.\n\n"
WIDE = PLAIN.replace("about ", "about  ")
CHOICES = '\nA. one\nB. two, or so\nC. a "third"\nD. four\nAnswer:'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def who(model):
    return tiny_mmlu.examinee(model)


def contexts(suite, who):
    return [task.prompt(document, who)["input"] for task in suite.tasks for document in task.documents]


# Subjects


def test_there_are_57_subjects_in_the_harnesss_groups():
    assert len(SUBJECTS) == 57
    assert list(SUBJECTS) == sorted(SUBJECTS)
    sizes = {group: len(subjects_of(f"mmlu_{group}")) for group in GROUPS}
    assert sizes == {"stem": 19, "humanities": 13, "social_sciences": 12, "other": 13}
    assert SUBJECTS["anatomy"] == "stem"  # where one would not look for it
    assert len(NAMES) == 61
    assert doctest.testmod(protocols).failed == doctest.testmod(subjects).failed == 0


# Files


def test_the_papers_zero_shot_prompts_are_had_byte_for_byte(who):
    found = tiny_mmlu.suite(who, REAL, "mmlu_college_mathematics", protocol="qlora", num_fewshot=0)
    rows = [json.dumps(task.prompt(document, who)) + "\n" for task in found.tasks for document in task.documents]
    assert "".join(rows).encode() == (REAL / "zero_shot_val.jsonl").read_bytes()
    assert any("\\r\\n" in row for row in rows)  # Windows line ends within questions are theirs


def test_prompts_are_read_back_from_the_papers_file(who):
    written = tiny_mmlu.suite(who, REAL, "mmlu_college_mathematics", protocol="qlora", num_fewshot=0)
    read = tiny_mmlu.suite(who, REAL / "zero_shot_val.jsonl", "mmlu_college_mathematics")
    for a, b in zip(written.tasks[0].documents, read.tasks[0].documents, strict=True):
        assert written.tasks[0].prompt(a, who) == read.tasks[0].prompt(b, who)
        assert written.tasks[0].requests(a, who) == read.tasks[0].requests(b, who)
    assert set(read.tasks[0].metrics) == {"acc", "mmlu_loss"}  # such a file is protocol qlora's


def test_documents_have_the_harnesss_keys(who, tmp_path):
    found = tiny_mmlu.suite(who, tiny_mmlu.folder(tmp_path, {"anatomy": "D"}))
    assert found.tasks[0].documents == [
        {
            "question": "Is it 0 in anatomy?",
            "subject": "anatomy",
            "choices": ["one", "two, or so", 'a "third"', "four"],
            "answer": 3,
        }
    ]
    assert found.tasks[0].target(found.tasks[0].documents[0]) == "D"


def test_a_copy_with_windows_line_ends_or_a_byte_order_mark_reads_the_same(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "AB"}, dev="ABCDA")
    file = tmp_path / "test" / "anatomy_test.csv"
    file.write_text(file.read_text().replace("Is it 0", '"Is\nit 0').replace("anatomy?,", 'anatomy?",', 1))
    before = tiny_mmlu.suite(who, tmp_path).tasks[0].documents
    assert before[0]["question"] == "Is\nit 0 in anatomy?"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert tiny_mmlu.suite(who, tmp_path).tasks[0].documents == before


ROW = "Is it?,one,two,three,four,"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (ROW + "A\n" + "Is it?,one,two,three,B\n", r"anatomy_test\.csv:2: has another number of fields \(5\)"),
        (ROW + "A\n" + ROW + "E\n", r"anatomy_test\.csv:2: the answer is 'E'; A, B, C or D"),
        (ROW + "b\n", r":1: the answer is 'b'"),
        ("question,A,B,C,D,answer\n" + ROW + "A\n", r":1: the answer is 'answer'; .* and no header"),
        (ROW + "A\n" + " ,one,two,three,four,A\n", r":2: the question is empty"),
        ('"Is it?,one,two,three,four,A\n', r":1: is not CSV"),
        ("", r"anatomy_test\.csv has no questions"),
        ("\n\n", r"anatomy_test\.csv has no questions"),
        (b"Is it \xff?,one,two,three,four,A\n", r":1: is not UTF-8"),
    ],
)
def test_a_file_that_is_not_mmlus_is_refused_with_its_line(who, tmp_path, content, says):
    tiny_mmlu.folder(tmp_path, {"anatomy": "A"})
    file = tmp_path / "test" / "anatomy_test.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        tiny_mmlu.suite(who, tmp_path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"subject": "anatomy", "input": "Is it?", "output": "E"}, r":2: the answer is 'E'"),
        ({"subject": "anatomy", "output": "A"}, r":2: 'input' is no text"),
        ({"subject": "anatomy", "input": 3, "output": "A"}, r":2: 'input' is no text"),
        ({"subject": "anathomy", "input": "Is it?", "output": "A"}, r":2: 'anathomy' is no subject of MMLU"),
        (["anatomy"], r":2: is a list, not an object"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_refused_with_its_line(who, tmp_path, row, says):
    rows = [{"subject": "anatomy", "input": "Is it?", "output": "A"}, row]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=says):
        tiny_mmlu.suite(who, tmp_path / "val.jsonl")


def test_all_of_mmlu_needs_all_files_and_a_part_only_its_own(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "AB", "virology": "C"})
    assert len(tiny_mmlu.suite(who, tmp_path, "mmlu_virology").tasks) == 1
    with pytest.raises(DataError, match=r"has no abstract_algebra_test.csv, and 54 more files .* mmlu_anatomy"):
        tiny_mmlu.suite(who, tmp_path, "mmlu")
    prompts = tmp_path / "val.jsonl"
    rows = [{"subject": subject, "input": "Is it?", "output": "A"} for subject in ("anatomy", "virology")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [task.documents for task in tiny_mmlu.suite(who, prompts).tasks] == [rows[:1]]
    with pytest.raises(DataError, match=r"no prompts about abstract_algebra, and 17 more subjects .* mmlu_anatomy"):
        tiny_mmlu.suite(who, prompts, "mmlu_stem")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_fewshot": 6}, "num_fewshot is 6; MMLU has 5"),
        ({"split": "dev"}, "with split dev num_fewshot must be 0"),
        ({"name": "mmlu_alchemy"}, "'mmlu_alchemy' is no part of mmlu"),
        ({"data": None}, "mmlu_anatomy needs its data: a folder with"),
        ({"data": Path("nowhere")}, "nowhere does not exist"),
        ({"data": Path(__file__).parent}, "has no folder test"),
        ({"data": REAL / "zero_shot_val.jsonl", "protocol": "harness"}, "ready prompts, which are protocol qlora's"),
        ({"data": REAL / "zero_shot_val.jsonl", "num_fewshot": 5}, "which num_fewshot cannot change"),
        ({"data": REAL / "zero_shot_val.jsonl", "split": "val"}, "which split cannot change"),
    ],
)
def test_what_cannot_be_asked_is_refused(who, tmp_path, settings, says):
    tiny_mmlu.folder(tmp_path, {"anatomy": "AB"})
    given: dict[str, Any] = {"name": "mmlu_anatomy", "data": tmp_path, **settings}
    with pytest.raises((ConfigError, DataError), match=says):
        FAMILY.build(Spec(examinee=who, **given))


def test_a_roberta_is_refused_and_too_few_solved_questions_are(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "AB"}, dev="AB")
    with pytest.raises(DataError, match=r"anatomy_dev.csv has 2 questions, but 5 are to stand"):
        tiny_mmlu.suite(who, tmp_path)
    assert tiny_mmlu.suite(who, tmp_path, num_fewshot=2).tasks[0].num_fewshot == 2
    with pytest.raises(ConfigError, match="RoBERTa"):
        tiny_mmlu.suite(replace(who, architecture="roberta"), tmp_path)


# Protocols


def shot(number, letter, white=""):
    return f"{white}Is it {number} in anatomy?{white}{CHOICES} {letter}\n\n"


def test_the_harness_strips_questions_and_joins_the_first_ones_of_dev(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"}, white="  ")
    (found,) = contexts(tiny_mmlu.suite(who, tmp_path, protocol="harness", num_fewshot=2), who)
    assert found == PLAIN + shot(0, "A") + shot(1, "B") + f"Is it 0 in anatomy?{CHOICES}"


@pytest.mark.parametrize("protocol", ["hendrycks", "qlora"])
def test_the_original_headers_have_two_spaces_and_questions_stay_as_they_are(who, tmp_path, protocol):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"}, white="  ")
    (found,) = contexts(tiny_mmlu.suite(who, tmp_path, protocol=protocol, num_fewshot=2), who)
    assert found == WIDE + shot(0, "A", "  ") + shot(1, "B", "  ") + f"  Is it 0 in anatomy?  {CHOICES}"


def test_five_solved_questions_of_dev_are_the_default_however_many_there_are(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"}, dev="ABCDABCD")
    found = tiny_mmlu.suite(who, tmp_path)
    assert found.tasks[0].num_fewshot == 5
    assert [f"Is it {n} in" in contexts(found, who)[0] for n in range(6)] == [True] * 5 + [False]


@pytest.mark.parametrize(("protocol", "split"), [("harness", "test"), ("hendrycks", "test"), ("qlora", "val")])
def test_each_protocol_has_its_split(who, tmp_path, protocol, split):
    tiny_mmlu.folder(tmp_path, {"anatomy": "ABC"})
    (tmp_path / split / f"anatomy_{split}.csv").write_text(ROW + "A\n")
    assert len(tiny_mmlu.suite(who, tmp_path, protocol=protocol).tasks[0].documents) == 1


def asked(who, data, **settings):
    """What is asked about the first question."""
    (task,) = tiny_mmlu.suite(who, data, **settings).tasks
    return requested(task, who)[0]


def requested(task, who):
    found = task.requests(task.documents[0], who)
    assert all(isinstance(it, Likelihood) for it in found)
    return [it for it in found if isinstance(it, Likelihood)]


def test_the_harness_cuts_what_is_too_long_on_the_left(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"})
    whole = asked(who, tmp_path).context_ids
    cut = asked(replace(who, max_tokens=40), tmp_path)
    assert cut.context_ids == whole[-40:]
    assert cut.cut == len(whole) - 40
    assert asked(who, tmp_path, window=40).context_ids == whole[-40:]


@pytest.mark.parametrize("protocol", ["hendrycks", "qlora"])
def test_the_others_leave_out_solved_questions_one_by_one_from_the_end(who, tmp_path, protocol):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"})
    few = [asked(who, tmp_path, protocol=protocol, num_fewshot=n).context_ids for n in range(6)]
    for count in range(5):
        for window in (len(few[count]), len(few[count + 1]) - 1):
            assert asked(who, tmp_path, protocol=protocol, window=window).context_ids == few[count]


def test_the_window_is_the_models_own_for_hendrycks_and_2048_tokens_for_qlora(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"})
    one = asked(who, tmp_path, protocol="hendrycks", num_fewshot=1).context_ids
    short = replace(who, max_tokens=len(one))
    assert asked(short, tmp_path, protocol="hendrycks").context_ids == one
    five = asked(who, tmp_path, protocol="qlora").context_ids
    cut = asked(short, tmp_path, protocol="qlora")
    assert cut.context_ids == five[: len(one)]  # the file was made for 2,048; what is cut now is the question
    long = "\n".join(["b"] * 300)  # 600 tokens
    with open(tmp_path / "dev" / "anatomy_dev.csv", "w") as file:
        file.writelines(f'"{long}",one,two,three,four,A\n' for _ in range(5))
    assert asked(replace(who, max_tokens=9999), tmp_path, protocol="qlora").context.count("\nb") == 3 * 300
    assert asked(replace(who, max_tokens=9999), tmp_path, protocol="hendrycks").context.count("\nb") == 5 * 300


def test_a_question_alone_that_is_too_long_keeps_its_end_or_for_qlora_its_start(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"})
    alone = asked(who, tmp_path, protocol="hendrycks", num_fewshot=0).context_ids
    assert asked(who, tmp_path, protocol="hendrycks", window=40).context_ids == alone[-40:]
    assert asked(who, tmp_path, protocol="qlora", window=40).context_ids == alone[:40]


def test_letters_have_the_ids_that_they_have_in_the_text(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "C"})
    (task,) = tiny_mmlu.suite(who, tmp_path, protocol="qlora").tasks
    found = requested(task, who)
    text = task.prompt(task.documents[0], who)["input"]
    for letter, request in zip("ABCD", found, strict=False):
        assert [*request.context_ids, *request.continuation_ids] == who.tokenizer.encode(f"{text} {letter}")
    assert found[0].continuation_ids != tuple(who.tokenizer.encode("A"))  # what it is alone
    assert found[4].continuation_ids == (*found[2].continuation_ids, who.tokenizer.eos_token_id)
    assert len({request.row for request in found}) == 1  # one pass through the model


# Counting


def letter_id(who, letter):
    return who.pair("Answer:", f" {letter}")[1][0]


UNEQUAL = {"anatomy": "BBAC", "virology": "BB", "sociology": "DB", "philosophy": "A"}


def measured(model, tmp_path, protocol, answers=UNEQUAL, letter="B"):
    """Values of each metric by subject, of a model that always answers one letter."""
    who = tiny_mmlu.examinee(model, loaded=models.load(model, dtype=torch.float32))
    tiny_mmlu.always(who.model, letter_id(who, letter))
    values = {}
    tiny_mmlu.folder(tmp_path, answers)
    for subject in answers:
        (task,) = tiny_mmlu.suite(who, tmp_path, f"mmlu_{subject}", protocol=protocol, num_fewshot=1).tasks
        requests = [task.requests(document, who) for document in task.documents]
        answered = iter(answer_all(who, [request for each in requests for request in each]))
        scores = [task.score(d, [next(answered) for _ in r]) for d, r in zip(task.documents, requests, strict=True)]
        values[subject] = {name: [score[name] for score in scores] for name in task.metrics}
    return values


@pytest.mark.parametrize("protocol", ["harness", "hendrycks", "qlora"])
def test_who_always_answers_b_is_right_where_b_is_right(model, tmp_path, protocol):
    found = measured(model, tmp_path, protocol)
    right = {subject: [float(letter == "B") for letter in letters] for subject, letters in UNEQUAL.items()}
    assert {subject: values["acc"] for subject, values in found.items()} == right


def test_the_loss_is_that_of_the_letter_and_the_end_of_the_text(model, tmp_path):
    found = measured(model, tmp_path, "qlora")
    vocabulary = models.load_tokenizer(model).vocab_size
    total = math.log(math.exp(10) + vocabulary - 1)
    right, wrong = (total + total - 10) / 2, total
    expected = [right, right, wrong, wrong]
    assert found["anatomy"]["mmlu_loss"] == pytest.approx(expected, rel=1e-5)


def test_of_equally_probable_letters_the_first_is_the_answer(who, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "ABCD"})
    (task,) = tiny_mmlu.suite(who, tmp_path).tasks
    assert [task.score(it, [[-1.0, False]] * 4)["acc"] for it in task.documents] == [1, 0, 0, 0]
    answers = [[-3.0, False], [-1.0, False], [-2.0, False], [-1.0, False]]
    assert [task.score(it, answers)["acc"] for it in task.documents] == [0, 1, 0, 0]


def complete(tmp_path):
    """All 57 subjects: one question each whose answer is B, but for those above."""
    answers = {subject: UNEQUAL.get(subject, "B") for subject in SUBJECTS}
    return tiny_mmlu.folder(tmp_path, answers), answers


def test_macro_and_micro_are_what_counting_says(model, tmp_path):
    data, answers = complete(tmp_path)
    who = tiny_mmlu.examinee(model, loaded=models.load(model, dtype=torch.float32))
    tiny_mmlu.always(who.model, letter_id(who, "B"))
    found = {
        protocol: evaluate([tiny_mmlu.suite(who, data, "mmlu", protocol=protocol, num_fewshot=0)], who).groups
        for protocol in ("harness", "qlora")
    }
    total = math.log(math.exp(10) + who.model.config.vocab_size - 1)
    loss = (58 * (total - 5) + 4 * total) / 62  # over all questions, also where subjects count the same
    assert found["qlora"]["mmlu"].scores["mmlu_loss"].value == pytest.approx(loss, rel=1e-5)
    assert "mmlu_loss" not in found["harness"]["mmlu"].scores
    shares = {subject: letters.count("B") / len(letters) for subject, letters in answers.items()}
    macro = sum(shares.values()) / 57
    micro = sum(letters.count("B") for letters in answers.values()) / sum(map(len, answers.values()))
    assert found["harness"]["mmlu"].scores["acc"].value == pytest.approx(micro)
    assert found["harness"]["mmlu_macro"].scores["acc"].value == pytest.approx(macro)
    assert found["qlora"]["mmlu"].scores["acc"].value == pytest.approx(macro)
    assert found["qlora"]["mmlu_micro"].scores["acc"].value == pytest.approx(micro)
    assert found["harness"]["mmlu_other"].scores["acc"].value == 1
    stem = [answers[subject] for subject in subjects_of("mmlu_stem")]
    assert found["harness"]["mmlu_stem"].scores["acc"].value == pytest.approx(
        "".join(stem).count("B") / len("".join(stem))
    )


def test_groups_are_named_as_in_the_harness_and_both_means_are_there(who, tmp_path):
    data, _ = complete(tmp_path)
    for protocol, own, other in (("harness", False, "macro"), ("hendrycks", False, "macro"), ("qlora", True, "micro")):
        top, *inner, last = tiny_mmlu.suite(who, data, "mmlu", protocol=protocol).groups
        assert [top.name, top.equal, last.name, last.equal] == ["mmlu", own, f"mmlu_{other}", not own]
        assert top.members == tuple(group.name for group in inner)
        assert [group.alias for group in inner] == ["stem", "humanities", "social sciences", "other"]
        assert {group.equal for group in inner} == {own}
        assert sorted(member for group in inner for member in group.members) == list(last.members)
        top, last = tiny_mmlu.suite(who, data, "mmlu_other", protocol=protocol).groups
        assert [top.name, top.alias, last.name] == ["mmlu_other", "other", f"mmlu_other_{other}"]
        assert len(top.members) == len(last.members) == 13
    assert tiny_mmlu.suite(who, data, "mmlu_anatomy").groups == []


# Tracking


def examination(who, data, name="mmlu_anatomy", limit=None, **settings):
    return Examination(Spec(name=name, examinee=who, data=data, num_fewshot=0, **settings), limit)


def test_a_standing_is_what_counting_says(model, tmp_path):
    data, answers = complete(tmp_path)
    who = tiny_mmlu.examinee(model)
    loaded = tiny_mmlu.always(models.load(model, dtype=torch.float32), letter_id(who, "B")).train()
    found = examination(who, data, "mmlu").take(loaded)
    shares = {subject: letters.count("B") / len(letters) for subject, letters in answers.items()}
    assert found.subjects == shares
    assert found.accuracy == pytest.approx(sum(shares.values()) / 57)
    assert found.questions == sum(map(len, answers.values())) == 62
    assert found.micro == 58 / 62
    for group in GROUPS:
        own = [shares[subject] for subject in subjects_of(f"mmlu_{group}")]
        assert found.groups[group] == pytest.approx(sum(own) / len(own))
    assert found.stderr is None  # of a subject with one question there is none
    total = math.log(math.exp(10) + loaded.config.vocab_size - 1)
    assert found.loss == pytest.approx((58 * (total - 5) + 4 * total) / 62, rel=1e-5)
    assert loaded.training


def test_the_error_of_the_mean_over_subjects_is_that_of_independent_ones(model, tmp_path):
    answers = {subject: "BBAC" if subject == "virology" else "BA" for subject in subjects_of("mmlu_other")}
    who = tiny_mmlu.examinee(model)
    loaded = tiny_mmlu.always(models.load(model, dtype=torch.float32), letter_id(who, "B"))
    data = tiny_mmlu.folder(tmp_path, answers)
    found = examination(who, data, "mmlu_other").take(loaded)
    # A half right of two has the variance 1/2, so its mean 1/4; of four the variance 1/3, so 1/12.
    assert found.stderr == pytest.approx(math.sqrt(12 / 4 + 1 / 12) / 13)
    assert examination(who, data, "mmlu_other", limit=2).take(loaded).subjects["virology"] == 1.0
    (one,) = examination(who, data, "mmlu_virology").take(loaded).subjects.items()
    assert one == ("virology", 0.5)
    assert examination(who, data, "mmlu_virology").take(loaded).micro == 0.5


def test_questions_are_asked_without_dropout_and_draw_no_number(model, tmp_path):
    tiny_mmlu.folder(tmp_path, {"anatomy": "AB"})
    who = tiny_mmlu.examinee(model)
    exam = examination(who, tmp_path)
    loaded = models.load(model, dtype=torch.float32)
    models.attach_lora(loaded, models.LoraConfig(rank=2, dropout=0.5))
    for name, parameter in loaded.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    state = torch.get_rng_state()
    assert exam.take(loaded.train()) == exam.take(loaded.train())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_is_restored_after_an_error_too(model, tmp_path, monkeypatch):
    tiny_mmlu.folder(tmp_path, {"anatomy": "AB"})
    who = tiny_mmlu.examinee(model)
    exam = examination(who, tmp_path)
    loaded = models.load(model, dtype=torch.float32).train()
    monkeypatch.setattr(loaded, "head", lambda hidden: hidden[0, 0, 0, 0])
    with pytest.raises(IndexError):
        exam.take(loaded)
    assert loaded.training


# The ground


def test_questions_of_one_row_are_answered_as_alone(model):
    who = tiny_mmlu.examinee(model, loaded=models.load(model, dtype=torch.float32))
    alone = [likelihood(who, "It is", text) for text in (" A", " B", " C")]
    alone.append(likelihood(who, "It is", " B", ends=True))
    together = in_one_row(alone)
    assert together == alone  # the same is asked
    assert [request.length for request in together].count(together[3].length) == 4
    assert len({request.row for request in together}) == 1
    one_by_one = [Likelihood.answer(who, [[request]])[0][0] for request in alone]
    (at_once,) = Likelihood.answer(who, [together])
    assert [value for value, _ in at_once] == pytest.approx([value for value, _ in one_by_one], rel=1e-5)
    assert [greedy for _, greedy in at_once] == [greedy for _, greedy in one_by_one]


def test_what_does_not_begin_alike_keeps_its_own_row(who):
    other = likelihood(who, "It is", " red blue")
    longest = likelihood(who, "It is", " blue and green")
    elsewhere = likelihood(who, "It was", " A")
    assert in_one_row([other, longest, elsewhere])[0].row == other.row
    assert in_one_row([other, longest, elsewhere])[2].row == elsewhere.row


def test_the_end_of_a_text_is_part_of_a_continuation_where_there_is_such_a_token(who):
    assert likelihood(who, "It is", " A", ends=True).continuation_ids == (*who.pair("It is", " A")[1], 2)
    endless = replace(who)
    endless.tokenizer.eos_token_id, before = None, endless.tokenizer.eos_token_id
    try:
        assert likelihood(endless, "It is", " A", ends=True) == likelihood(endless, "It is", " A")
    finally:
        endless.tokenizer.eos_token_id = before


# The real files


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with the real data")
def test_the_real_files_give_the_papers_prompts():
    assert SHARED is not None
    assets = SHARED / "assets"
    data = assets / "data" / "mmlu"

    def rows(tokenizer, **settings):
        known = models.load_tokenizer(assets / "tokenizers" / tokenizer)
        who = Examinee(tokenizer=known, architecture="llama")
        tasks = tiny_mmlu.suite(who, data, "mmlu", protocol="qlora", **settings).tasks
        return [json.dumps(task.prompt(document, who)) + "\n" for task in tasks for document in task.documents]

    zero = rows("gpt2", num_fewshot=0)
    assert "".join(zero).encode() == (data / "qlora_zero_shot_mmlu_val.jsonl").read_bytes()
    five = rows("llama")  # the paper's five-shot file was cut to 2,048 of LLaMA's tokens, the first id among them
    assert len(five) == 1531
    assert sum(map(len, five)) == 4_645_672
    assert sum(map(len, rows("gpt2", window=10**6))) == 4_832_594  # nothing left out
    who = Examinee(tokenizer=models.load_tokenizer(assets / "tokenizers" / "gpt2"), architecture="llama")
    assert sum(len(task.documents) for task in tiny_mmlu.suite(who, data, "mmlu").tasks) == 14_042
