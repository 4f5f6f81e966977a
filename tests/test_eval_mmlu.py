"""MMLU: its files, its three protocols to the letter, and what counting says of a model that always answers B."""

import doctest
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval.mmlu.protocols
import eval.mmlu.subjects
import models
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.likelihood import Likelihood, in_one_row, likelihood
from eval.mmlu.family import FAMILY
from eval.mmlu.subjects import GROUPS, NAMES, SUBJECTS, subjects_of
from eval.mmlu.tracking import Examination
from eval.task import Spec
from models.errors import ConfigError, DataError
from tests import mmlu, tiny

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
    return mmlu.examinee(model)


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
    assert doctest.testmod(eval.mmlu.subjects).failed == doctest.testmod(eval.mmlu.protocols).failed == 0


# Files


def test_the_papers_zero_shot_prompts_are_had_byte_for_byte(who):
    found = mmlu.suite(who, REAL, "mmlu_college_mathematics", protocol="qlora", num_fewshot=0)
    rows = [json.dumps(task.prompt(document, who)) + "\n" for task in found.tasks for document in task.documents]
    assert "".join(rows).encode() == (REAL / "zero_shot_val.jsonl").read_bytes()
    assert any("\\r\\n" in row for row in rows)  # Windows line ends within questions are theirs


def test_prompts_are_read_back_from_the_papers_file(who):
    written = mmlu.suite(who, REAL, "mmlu_college_mathematics", protocol="qlora", num_fewshot=0)
    read = mmlu.suite(who, REAL / "zero_shot_val.jsonl", "mmlu_college_mathematics")
    for a, b in zip(written.tasks[0].documents, read.tasks[0].documents, strict=True):
        assert written.tasks[0].prompt(a, who) == read.tasks[0].prompt(b, who)
        assert written.tasks[0].requests(a, who) == read.tasks[0].requests(b, who)
    assert set(read.tasks[0].metrics) == {"acc", "mmlu_loss"}  # such a file is protocol qlora's


def test_documents_have_the_harnesss_keys(who, tmp_path):
    found = mmlu.suite(who, mmlu.folder(tmp_path, {"anatomy": "D"}))
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
    mmlu.folder(tmp_path, {"anatomy": "AB"}, dev="ABCDA")
    file = tmp_path / "test" / "anatomy_test.csv"
    file.write_text(file.read_text().replace("Is it 0", '"Is\nit 0').replace("anatomy?,", 'anatomy?",', 1))
    before = mmlu.suite(who, tmp_path).tasks[0].documents
    assert before[0]["question"] == "Is\nit 0 in anatomy?"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert mmlu.suite(who, tmp_path).tasks[0].documents == before


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
    mmlu.folder(tmp_path, {"anatomy": "A"})
    file = tmp_path / "test" / "anatomy_test.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        mmlu.suite(who, tmp_path)


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
        mmlu.suite(who, tmp_path / "val.jsonl")


def test_all_of_mmlu_needs_all_files_and_a_part_only_its_own(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "AB", "virology": "C"})
    assert len(mmlu.suite(who, tmp_path, "mmlu_virology").tasks) == 1
    with pytest.raises(DataError, match=r"has no abstract_algebra_test.csv, and 54 more files .* mmlu_anatomy"):
        mmlu.suite(who, tmp_path, "mmlu")
    prompts = tmp_path / "val.jsonl"
    prompts.write_text(json.dumps({"subject": "anatomy", "input": "Is it?", "output": "A"}) + "\n")
    assert len(mmlu.suite(who, prompts).tasks[0].documents) == 1
    with pytest.raises(DataError, match=r"no prompts about abstract_algebra, and 17 more subjects .* mmlu_anatomy"):
        mmlu.suite(who, prompts, "mmlu_stem")


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
    mmlu.folder(tmp_path, {"anatomy": "AB"})
    given = {"name": "mmlu_anatomy", "data": tmp_path, **settings}
    with pytest.raises((ConfigError, DataError), match=says):
        FAMILY.build(Spec(examinee=who, **given))


def test_a_roberta_is_refused_and_too_few_solved_questions_are(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "AB"}, dev="AB")
    with pytest.raises(DataError, match=r"anatomy_dev.csv has 2 questions, but 5 are to stand"):
        mmlu.suite(who, tmp_path)
    assert mmlu.suite(who, tmp_path, num_fewshot=2).tasks[0].num_fewshot == 2
    with pytest.raises(ConfigError, match="RoBERTa"):
        mmlu.suite(replace(who, architecture="roberta"), tmp_path)


# Protocols


def shot(number, letter, white=""):
    return f"{white}Is it {number} in anatomy?{white}{CHOICES} {letter}\n\n"


def test_the_harness_strips_questions_and_joins_the_first_ones_of_dev(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "C"}, white="  ")
    (found,) = contexts(mmlu.suite(who, tmp_path, protocol="harness", num_fewshot=2), who)
    assert found == PLAIN + shot(0, "A") + shot(1, "B") + f"Is it 0 in anatomy?{CHOICES}"


@pytest.mark.parametrize("protocol", ["hendrycks", "qlora"])
def test_the_original_headers_have_two_spaces_and_questions_stay_as_they_are(who, tmp_path, protocol):
    mmlu.folder(tmp_path, {"anatomy": "C"}, white="  ")
    (found,) = contexts(mmlu.suite(who, tmp_path, protocol=protocol, num_fewshot=2), who)
    assert found == WIDE + shot(0, "A", "  ") + shot(1, "B", "  ") + f"  Is it 0 in anatomy?  {CHOICES}"


def test_five_solved_questions_of_dev_are_the_default_however_many_there_are(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "C"}, dev="ABCDABCD")
    found = mmlu.suite(who, tmp_path)
    assert found.tasks[0].num_fewshot == 5
    assert [f"Is it {n} in" in contexts(found, who)[0] for n in range(6)] == [True] * 5 + [False]


@pytest.mark.parametrize(("protocol", "split"), [("harness", "test"), ("hendrycks", "test"), ("qlora", "val")])
def test_each_protocol_has_its_split(who, tmp_path, protocol, split):
    mmlu.folder(tmp_path, {"anatomy": "ABC"})
    (tmp_path / split / f"anatomy_{split}.csv").write_text(ROW + "A\n")
    assert len(mmlu.suite(who, tmp_path, protocol=protocol).tasks[0].documents) == 1


def asked(who, data, **settings):
    """What is asked about the first question: the context's ids."""
    (task,) = mmlu.suite(who, data, **settings).tasks
    return task.requests(task.documents[0], who)[0]


def test_the_harness_cuts_what_is_too_long_on_the_left(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "C"})
    whole = asked(who, tmp_path).context_ids
    cut = asked(replace(who, max_tokens=40), tmp_path)
    assert cut.context_ids == whole[-40:]
    assert cut.cut == len(whole) - 40
    assert asked(who, tmp_path, window=40).context_ids == whole[-40:]


@pytest.mark.parametrize("protocol", ["hendrycks", "qlora"])
def test_the_others_leave_out_solved_questions_one_by_one_from_the_end(who, tmp_path, protocol):
    mmlu.folder(tmp_path, {"anatomy": "C"})
    few = [asked(who, tmp_path, protocol=protocol, num_fewshot=n).context_ids for n in range(6)]
    for count in range(5):
        for window in (len(few[count]), len(few[count + 1]) - 1):
            assert asked(who, tmp_path, protocol=protocol, window=window).context_ids == few[count]


def test_the_window_is_the_models_own_for_hendrycks_and_2048_tokens_for_qlora(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "C"})
    one = asked(who, tmp_path, protocol="hendrycks", num_fewshot=1).context_ids
    short = replace(who, max_tokens=len(one))
    assert asked(short, tmp_path, protocol="hendrycks").context_ids == one
    five = asked(who, tmp_path, protocol="qlora").context_ids
    cut = asked(short, tmp_path, protocol="qlora")
    assert cut.context_ids == five[: len(one)]  # the file was made for 2,048; what is cut now is the question
    long = "\n".join(["word"] * 300)  # 600 tokens
    with open(tmp_path / "dev" / "anatomy_dev.csv", "w") as file:
        file.writelines(f'"{long}",one,two,three,four,A\n' for _ in range(5))
    assert asked(replace(who, max_tokens=9999), tmp_path, protocol="qlora").context.count("word") == 900
    assert asked(replace(who, max_tokens=9999), tmp_path, protocol="hendrycks").context.count("word") == 1500


def test_a_question_alone_that_is_too_long_keeps_its_end_or_for_qlora_its_start(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "C"})
    alone = asked(who, tmp_path, protocol="hendrycks", num_fewshot=0).context_ids
    assert asked(who, tmp_path, protocol="hendrycks", window=40).context_ids == alone[-40:]
    assert asked(who, tmp_path, protocol="qlora", window=40).context_ids == alone[:40]


def test_letters_have_the_ids_that_they_have_in_the_text(who, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "C"})
    (task,) = mmlu.suite(who, tmp_path, protocol="qlora").tasks
    found = task.requests(task.documents[0], who)
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
    who = mmlu.examinee(model, loaded=models.load(model, dtype=torch.float32))
    mmlu.always(who.model, letter_id(who, letter))
    values = {}
    for subject in mmlu.folder(tmp_path, answers) and answers:
        (task,) = mmlu.suite(who, tmp_path, f"mmlu_{subject}", protocol=protocol, num_fewshot=1).tasks
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
    mmlu.folder(tmp_path, {"anatomy": "ABCD"})
    (task,) = mmlu.suite(who, tmp_path).tasks
    assert [task.score(it, [[-1.0, False]] * 4)["acc"] for it in task.documents] == [1, 0, 0, 0]
    answers = [[-3.0, False], [-1.0, False], [-2.0, False], [-1.0, False]]
    assert [task.score(it, answers)["acc"] for it in task.documents] == [0, 1, 0, 0]


def complete(tmp_path):
    """All 57 subjects: one question each whose answer is B, but for those above."""
    answers = {subject: UNEQUAL.get(subject, "B") for subject in SUBJECTS}
    return mmlu.folder(tmp_path, answers), answers


def test_macro_and_micro_are_what_counting_says(model, tmp_path):
    data, answers = complete(tmp_path)
    who = mmlu.examinee(model, loaded=models.load(model, dtype=torch.float32))
    mmlu.always(who.model, letter_id(who, "B"))
    found = {}
    for protocol in ("harness", "qlora"):
        evaluate = pytest.importorskip("eval.evaluate").evaluate
        found[protocol] = evaluate([mmlu.suite(who, data, "mmlu", protocol=protocol, num_fewshot=0)], who).groups
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
        top, *inner, last = mmlu.suite(who, data, "mmlu", protocol=protocol).groups
        assert [top.name, top.equal, last.name, last.equal] == ["mmlu", own, f"mmlu_{other}", not own]
        assert top.members == tuple(group.name for group in inner)
        assert [group.alias for group in inner] == ["stem", "humanities", "social sciences", "other"]
        assert {group.equal for group in inner} == {own}
        assert sorted(member for group in inner for member in group.members) == list(last.members)
        top, last = mmlu.suite(who, data, "mmlu_other", protocol=protocol).groups
        assert [top.name, top.alias, last.name] == ["mmlu_other", "other", f"mmlu_other_{other}"]
        assert len(top.members) == len(last.members) == 13
    assert mmlu.suite(who, data, "mmlu_anatomy").groups == []


# Tracking


def test_a_standing_is_what_counting_says(model, tmp_path):
    mmlu.folder(tmp_path, UNEQUAL)
    who = mmlu.examinee(model)
    tasks = [mmlu.suite(who, tmp_path, f"mmlu_{it}", protocol="qlora", num_fewshot=0).tasks[0] for it in UNEQUAL]
    loaded = mmlu.always(models.load(model, dtype=torch.float32), letter_id(who, "B")).train()
    found = Examination(tasks, who).take(loaded)
    assert found.subjects == {"anatomy": 0.5, "virology": 1.0, "sociology": 0.5, "philosophy": 0.0}
    assert found.accuracy == 0.5
    assert found.micro == 5 / 9
    assert found.questions == 9
    assert found.groups == {"stem": 0.5, "other": 1.0, "social_sciences": 0.5, "humanities": 0.0}
    assert found.stderr is None  # of philosophy's one question there is none
    total = math.log(math.exp(10) + loaded.config.vocab_size - 1)
    assert found.loss == pytest.approx((5 * (total - 5) + 4 * total) / 9, rel=1e-5)
    assert loaded.training

    found = Examination(tasks[:3], who).take(loaded)  # standard errors sqrt(1/12), 0 and 1/2
    assert found.stderr == pytest.approx(math.sqrt(1 / 12 + 0 + 1 / 4) / 3)
    assert Examination(tasks[:3], who, limit=2).take(loaded).subjects["anatomy"] == 1.0


def test_questions_are_asked_without_dropout_and_draw_no_number(model, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "AB"})
    who = mmlu.examinee(model)
    exam = Examination(mmlu.suite(who, tmp_path, protocol="qlora").tasks, who)
    loaded = models.load(model, dtype=torch.float32)
    models.attach_lora(loaded, models.LoraConfig(rank=2, dropout=0.5))
    for name, parameter in loaded.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    state = torch.get_rng_state()
    assert exam.take(loaded.train()) == exam.take(loaded.train())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_is_restored_after_an_error_too(model, tmp_path):
    mmlu.folder(tmp_path, {"anatomy": "AB"})
    who = mmlu.examinee(model)
    exam = Examination(mmlu.suite(who, tmp_path, protocol="qlora").tasks, who)
    loaded = models.load(model, dtype=torch.float32).train()
    loaded.head = lambda hidden: hidden[0, 0, 0, 0]
    with pytest.raises(IndexError):
        exam.take(loaded)
    assert loaded.training


# The ground


def test_questions_of_one_row_are_answered_as_alone(model):
    who = mmlu.examinee(model, loaded=models.load(model, dtype=torch.float32))
    alone = [likelihood(who, "It is", text) for text in (" A", " B", " blue")]
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
    data = SHARED / "assets" / "data" / "mmlu"

    def rows(tokenizer, **settings):
        known = models.load_tokenizer(SHARED / "assets" / "tokenizers" / tokenizer)
        who = Examinee(tokenizer=known, architecture="llama")
        tasks = mmlu.suite(who, data, "mmlu", protocol="qlora", **settings).tasks
        return [json.dumps(task.prompt(document, who)) + "\n" for task in tasks for document in task.documents]

    zero = rows("gpt2", num_fewshot=0)
    assert "".join(zero).encode() == (data / "qlora_zero_shot_mmlu_val.jsonl").read_bytes()
    five = rows("llama")  # the paper's five-shot file was cut to 2,048 of LLaMA's tokens, the first id among them
    assert len(five) == 1531
    assert sum(map(len, five)) == 4_645_672
    assert sum(map(len, rows("gpt2", window=10**6))) == 4_832_594  # nothing left out
    who = Examinee(tokenizer=models.load_tokenizer(SHARED / "assets" / "tokenizers" / "gpt2"), architecture="llama")
    assert sum(len(task.documents) for task in mmlu.suite(who, data, "mmlu").tasks) == 14_042
