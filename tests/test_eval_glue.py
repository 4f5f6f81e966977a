"""GLUE by name and protocol: which tasks a name stands for, what is asked, what answers score, what is handed in."""

import json
import logging
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import models
import qlora
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.glue.documents import PARTS
from eval.glue.family import FAMILY, build
from eval.glue.metrics import UndefinedScore
from eval.task import Spec
from models.errors import ConfigError, DataError
from models.target import LoadOptions, load_target
from tests import glue_folder, tiny, tiny_roberta, tiny_t5
from tests.glue_folder import PAIRS, put
from train.data.batches import collate
from train.data.config import DataConfig
from train.data.dataset import load_data

PROMPTED = ["cola", "sst2", "mrpc", "qqp", "mnli", "mnli_mismatch", "qnli", "rte", "wnli"]
ENTAILED = ("entailment", "not_entailment")
THREE = ("entailment", "neutral", "contradiction")


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return glue_folder.write(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return examined(tiny.checkpoint(tmp_path_factory.mktemp("llama")), "llama")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return examined(tiny_t5.checkpoint(tmp_path_factory.mktemp("t5")), "t5")


def examined(path, architecture):
    model = models.load(path, dtype=torch.float32)
    return Examinee(
        tokenizer=models.load_tokenizer(path),
        architecture=architecture,
        max_tokens=model.max_tokens or 2048,
        loaded=model,
    )


@pytest.fixture
def roberta(tmp_path):
    """Make one whose head gives these labels."""
    return lambda *labels: examined(tiny_roberta.checkpoint(tmp_path / "-".join(("r", *labels)), labels), "roberta")


def named(name, examinee, data, **more) -> list[Any]:
    return list(build(Spec(name=name, examinee=examinee, data=data, **more)).tasks)


def scores(task, answers):
    values = [task.score(document, given) for document, given in zip(task.documents, answers, strict=True)]
    return {name: metric.aggregate([value[name] for value in values]) for name, metric in task.metrics.items()}


def asked(task, examinee, document=None):
    return task.requests(task.documents[0] if document is None else document, examinee)


# Names and protocols


def test_a_name_stands_for_all_parts_that_a_model_can_be_asked(glue, llama, t5, roberta):
    assert [task.name for task in named("glue", llama, glue)] == PROMPTED
    assert [task.name for task in named("glue-prompt", t5, glue)] == PROMPTED
    assert {task.name for task in named("glue-finetune", t5, glue)} == {*PROMPTED, "stsb"}
    assert {task.name for task in named("glue-finetune", llama, glue, split="test")} == set(PARTS)
    mnli = roberta(*THREE)
    assert [task.name for task in named("glue", mnli, glue)] == ["mnli", "mnli_mismatch"]
    assert [task.name for task in named("glue", mnli, glue, split="test")] == ["mnli", "mnli_mismatch", "ax"]
    assert [task.name for task in named("rte", roberta(*ENTAILED), glue / "RTE")] == ["rte"]
    assert {*PARTS, "glue-finetune", "glue-prompt"} == set(FAMILY.names)


def test_results_say_which_protocol_they_are_of(glue, llama, t5, roberta):
    for task, protocol in (
        (named("rte", llama, glue)[0], "glue-prompt"),
        (named("rte", t5, glue, protocol="finetune")[0], "glue-finetune"),
        (named("rte", roberta(*ENTAILED), glue)[0], "glue-finetune"),
    ):
        assert task.settings["protocol"] == protocol
        assert task.settings["data"] == str(glue / "RTE" / "dev.tsv")
        assert task.settings["split"] == "dev"


def test_a_part_without_data_is_left_out_and_said(tmp_path, llama, caplog):
    glue_folder.write(tmp_path, "RTE", "STS-B")
    with caplog.at_level(logging.WARNING):
        assert [task.name for task in named("glue", llama, tmp_path)] == ["rte"]
    assert "has no dev split of cola, sst2, mrpc, qqp, mnli, mnli_mismatch, qnli, wnli; left out" in caplog.text
    assert "stsb has no prompt, since its label is a score and no word; left out" in caplog.text
    with pytest.raises(DataError, match=r"has no dev split of cola or .*it is a folder with GLUE's official TSV files"):
        named("glue", llama, tmp_path / "RTE" / "dev.tsv")


def test_a_tasks_folder_given_for_all_of_them_is_not_taken_for_any_others(glue, llama):
    assert [task.name for task in named("glue", llama, glue / "RTE")] == ["rte"]


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("glue", {"data": None}, "glue needs --data: a folder with GLUE's official TSV files"),
        ("glue-prompt", {"protocol": "finetune"}, "task glue-prompt is the protocol prompt, but protocol finetune is"),
        ("stsb", {}, "stsb has no prompt: its label is a score, .*--protocol finetune"),
        ("rte", {"num_fewshot": 3, "protocol": "finetune"}, "examples before a question .* are for protocol prompt"),
        ("rte", {"num_fewshot": 7}, "num_fewshot is 7, but the train split of rte has 6 examples"),
        ("rte", {"num_fewshot": 6, "split": "train"}, "num_fewshot is 6, but the train split of rte has 6 examples"),
    ],
)
def test_what_makes_no_sense_is_refused(glue, llama, name, more, says):
    with pytest.raises(ConfigError, match=says):
        named(name, llama, **{"data": glue, **more})


def test_a_roberta_is_not_prompted(glue, roberta):
    for name, protocol in (("glue-prompt", None), ("rte", "prompt")):
        with pytest.raises(ConfigError, match="a RoBERTa writes no answer to a prompt"):
            named(name, roberta(*ENTAILED), glue, protocol=protocol)


# RoBERTa


def test_what_a_roberta_was_trained_on_is_told_by_its_labels_or_its_run(glue, roberta, tmp_path):
    assert [task.name for task in named("glue", roberta("acceptable", "unacceptable"), glue)] == ["cola"]
    assert [task.name for task in named("glue", roberta("number"), glue)] == ["stsb"]
    assert [task.name for task in named("glue", roberta("LABEL_0", "LABEL_1", "LABEL_2"), glue)][:1] == ["mnli"]
    for labels, says in (
        (
            ENTAILED,
            "cannot be told from its labels, entailment, not_entailment; it may be qnli or rte or wnli. Name it",
        ),
        (("LABEL_0", "LABEL_1"), "it may be cola or sst-2 or mrpc or qqp or qnli or rte or wnli. Name it"),
        (tuple("abcd"), "GLUE has no task with such. Name it"),
    ):
        with pytest.raises(ConfigError, match=says):
            named("glue", roberta(*labels), glue)
    run = tmp_path / "run"
    put(run / "data" / "manifest.json", json.dumps({"format": "glue-qnli"}))
    put(run / "config.toml", 'model = "m"\n[data]\nmax_len = 7\n')
    task = named("glue", replace(roberta(*ENTAILED), run=run), glue)[0]
    assert (task.name, task.settings["max_len"]) == ("qnli", 7)
    for more, length in (({}, 32), ({"window": 9}, 9), ({"window": 99}, 32)):
        assert named("rte", roberta(*ENTAILED), glue, **more)[0].settings["max_len"] == length
    examinee = replace(roberta(*ENTAILED), loaded=None)
    with pytest.raises(ConfigError, match="cannot be told; name it, as in --task rte"):
        named("glue", examinee, glue)
    assert named("rte", examinee, glue)[0].prompt(named("rte", examinee, glue)[0].documents[1], examinee) == {
        "task": "rte",
        "input": "<s>A C</s></s>D</s>",
        "output": "not_entailment",
    }


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (THREE, (0, 1, 2)),
        (("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), (2, 1, 0)),
        (("contradiction", "entailment", "neutral"), (1, 2, 0)),
        (("LABEL_0", "LABEL_1", "LABEL_2"), (0, 1, 2)),
        (("0", "1", "2"), (0, 1, 2)),
    ],
)
def test_logits_are_matched_to_labels_by_name(glue, roberta, labels, order):
    task = named("mnli", roberta(*labels), glue)[0]
    for label, column in enumerate(order):
        logits = [0.0, 0.0, 0.0]
        logits[column] = 1.0
        assert task.prediction(task.documents[0], [logits]) == label
        assert task.score({"label": label}, [logits]) == {"acc": 1.0}
        assert task.score({"label": (label + 1) % 3}, [logits]) == {"acc": 0.0}


@pytest.mark.parametrize(
    ("name", "labels", "says"),
    [
        ("rte", THREE, "rte needs entailment, not_entailment, but this model gives one of 3 labels"),
        ("rte", ("number",), "rte needs entailment, not_entailment, but this model gives a number"),
        ("stsb", ENTAILED, "sts-b needs a number, but this model gives one of 2 labels"),
        ("rte", ("few", "many"), "rte's labels are entailment, not_entailment, but this model's are few, many"),
        ("rte", (), "needs a RoBERTa with a head that gives labels, but this one fills masks"),
    ],
)
def test_a_model_for_another_task_is_refused(glue, roberta, name, labels, says):
    with pytest.raises(ConfigError, match=says):
        named(name, roberta(*labels), glue)


def test_scores_are_the_tasks_official_ones(glue, roberta):
    mrpc = named("mrpc", roberta("not_equivalent", "equivalent"), glue)[0]  # labels 1 0 1 0 1 0
    answers = [[[0.0, 1.0]], [[0.0, 1.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]]  # 1 1 0 0 1 0
    assert scores(mrpc, answers) == pytest.approx({"acc": 4 / 6, "f1": 4 / 6})
    cola = named("cola", roberta("unacceptable", "acceptable"), glue)[0]
    assert scores(cola, answers) == pytest.approx({"mcc": 1 / 3})
    stsb = named("stsb", roberta("number"), glue)[0]  # 0 5 3.733 0 5 3.733
    found = scores(stsb, [[[value]] for value in (0.5, 2.0, 9.0, 0.5, 2.0, 9.0)])
    assert found == pytest.approx({"pearson": pearson([0, 5, 3.733], [0.5, 2, 9]), "spearman": 0.5})
    with pytest.warns(UndefinedScore, match="all predictions are 1"):
        assert scores(stsb, [[[1.0]]] * 6) == {"pearson": 0.0, "spearman": 0.0}


def pearson(x, y):
    x, y = ([value - sum(side) / 3 for value in side] for side in (x, y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


TASKS = {"CoLA": {"matthews"}, "MRPC": {"accuracy", "f1"}, "STS-B": {"pearson", "spearman"}}


@pytest.mark.parametrize("folder", TASKS)
def test_a_run_is_scored_as_it_was_trained(glue, tmp_path, capsys, folder):
    """Trained on the command line, held-out metrics included; evaluated from its directory on the dev file."""
    base = tiny_roberta.checkpoint(tmp_path / "base")
    rows = (glue / folder / "train.tsv").read_text().splitlines(keepends=True)
    several = "".join(row.replace("A C", f"A C {'DEFGHIK'[n]}") for n, row in enumerate(rows))
    train = put(tmp_path / folder / "train.tsv", several)
    flags = "--max-steps 3 --batch-size 3 --accumulation 1 --lora.rank 2 --data.eval-size 3 --data.max-len 6 --quiet"
    data = ["--data.path", str(train), "--dtype", "float32", "--out", str(tmp_path / "run")]
    assert qlora.main(["train", "--model", str(base), *data, *flags.split()]) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line["split"] == "eval"]
    assert all(set(line) == {"step", "split", "loss", "labels", *TASKS[folder]} for line in held_out)
    shown = {"matthews": "Matthews", "f1": "F1", "spearman": "Spearman"}
    assert all(word in said for name, word in shown.items() if name in TASKS[folder])

    model, tokenizer = load_target(tmp_path / "run", LoadOptions(dtype="float32", device="cpu"))
    examinee = Examinee(
        tokenizer=tokenizer,
        architecture="roberta",
        max_tokens=model.max_tokens or 0,
        loaded=model,
        run=tmp_path / "run",
    )
    (task,) = named("glue", examinee, glue)
    assert task.name == folder.lower().replace("-", "")
    answers = answer_all(examinee, [asked(task, examinee, document)[0] for document in task.documents])
    kind = "regression" if folder == "STS-B" else "classification"
    config = DataConfig(path=str(glue / folder / "dev.tsv"), eval_size=0, max_len=6)
    batch = collate(list(load_data(config, tokenizer, kind).train), 1)
    with torch.inference_mode():
        expected = model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(torch.tensor(answers), expected, atol=1e-5, rtol=1e-5)
    assert [document["label"] for document in task.documents] == pytest.approx(batch["labels"].tolist())


# Labels as text


def test_a_t5_is_asked_as_it_was_trained(glue, t5):
    task = named("sst2", t5, glue, protocol="finetune")[0]
    (request,) = asked(task, t5)
    config = DataConfig(path=str(glue / "SST-2" / "dev.tsv"), eval_size=0)
    trained = load_data(config, t5.tokenizer, "seq2seq").train[0]
    assert request.prompt == "sst2 sentence: A C"
    assert list(request.ids) == trained.input_ids
    assert isinstance(answer_all(t5, [request])[0], str)


def test_a_llama_is_asked_as_it_was_trained(glue, llama):
    task = named("rte", llama, glue, protocol="finetune")[0]
    (request,) = asked(task, llama)
    config = DataConfig(path=str(glue / "RTE" / "dev.tsv"), eval_size=0)
    trained = load_data(config, llama.tokenizer, "causal").train[0]
    assert list(request.ids) == trained.input_ids[: len(request.ids)]
    assert trained.labels[len(request.ids) - 1 : len(request.ids) + 1] == [-100, trained.input_ids[len(request.ids)]]
    assert request.arguments[0] == "rte sentence1: A C sentence2: D"


def test_written_labels_are_compared_to_the_letter_and_others_are_wrong(glue, t5):
    mrpc = named("mrpc", t5, glue, protocol="finetune")[0]  # labels 1 0 1 0 1 0
    right = [[mrpc.target(document)] for document in mrpc.documents]
    assert right[:2] == [["equivalent"], ["not_equivalent"]]
    assert scores(mrpc, right) == {"acc": 1.0, "f1": 1.0}
    other = [[" equivalent "], ["Not_equivalent"], ["equivalent."], ["not_equivalent"], [""], ["not_equivalent"]]
    # As T5 counts: right, wrong, wrong, right, wrong, right; for F1 TP 1, FP 1, FN 2.
    assert scores(mrpc, other) == pytest.approx({"acc": 0.5, "f1": 2 / 5})
    cola = named("cola", t5, glue, protocol="finetune")[0]
    with pytest.warns(UndefinedScore, match="all predictions are -1"):
        assert scores(cola, [["gibberish"]] * 6) == {"mcc": 0.0}
    mixed = [["acceptable"], ["unacceptable"], ["x"], ["y"], ["acceptable"], ["unacceptable"]]  # 1 0 - - 1 0
    # Gorodkin's form with a third class: hits 4 of 6; labels 3, 3; predictions 2, 2, 2.
    assert scores(cola, mixed) == pytest.approx({"mcc": (4 * 6 - 12) / math.sqrt((36 - 18) * (36 - 12))})


def test_a_written_score_is_a_number_and_anything_else_is_minus_1(glue, t5):
    stsb = named("stsb", t5, glue, protocol="finetune")[0]
    for answer, expected in (
        ("3.8", 3.8),
        (" 4 ", 4.0),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("nan", -1.0),
        ("inf", -1.0),
        ("1e400", -1.0),
        ("3,8", -1.0),
        ("٣", -1.0),
        ("9" * 400, -1.0),
        ("", -1.0),
    ):
        assert stsb.prediction(stsb.documents[0], [answer]) == expected, answer


# Prompts


SHOWN = {  # what lm-evaluation-harness asks of the first row, and the words for its labels
    "cola": ("A C\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes")),
    "sst2": ("A C \nQuestion: Is this sentence positive or negative?\nAnswer:", ("negative", "positive")),
    "mrpc": (
        "Sentence 1: A C\nSentence 2: D\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
    ),
    "qqp": ("Question 1: A\nQuestion 2: C\nQuestion: Do both questions ask the same thing?\nAnswer:", ("no", "yes")),
    "mnli": ("A C 0\nQuestion: D. True, False or Neither?\nAnswer:", ("True", "Neither", "False")),
    "mnli_mismatch": ("A C 0\nQuestion: D. True, False or Neither?\nAnswer:", ("True", "Neither", "False")),
    "qnli": ("A\nC D\nQuestion: Does this response answer the question?\nAnswer:", ("yes", "no")),
    "rte": ("A C\nQuestion: D True or False?\nAnswer:", ("True", "False")),
    "wnli": ("A C\nQuestion: D True or False?\nAnswer:", ("False", "True")),
}


@pytest.mark.parametrize("name", SHOWN)
def test_prompts_are_the_harnesss(glue, llama, name):
    (task,) = named(name, llama, glue)
    context, words = SHOWN[name]
    requests = asked(task, llama)
    assert [request.arguments for request in requests] == [(context, f" {word}") for word in words]
    label = task.documents[0]["label"]
    assert task.prompt(task.documents[0], llama) == {"task": name, "input": context, "output": words[label]}
    assert task.version == {"qqp": 2.0, "wnli": 2.0}.get(name, 1.0)
    answers = [[-2.0, False]] * len(words)
    answers[label] = [-1.0, False]
    measured = {"cola": {"mcc"}, "mrpc": {"acc", "f1"}, "qqp": {"acc", "f1"}}.get(name, {"acc"})
    assert set(task.score(task.documents[0], answers)) == set(task.metrics) == measured
    assert task.prediction(task.documents[0], answers) == label


def test_a_hypothesis_is_made_a_sentence_and_braces_are_text(llama, tmp_path):
    put(tmp_path / "MNLI" / "dev.tsv", "index\tsentence1\tsentence2\tgold_label\n0\t{0} {x}\t D. \t1\n")
    (task,) = named("mnli", llama, tmp_path)
    assert asked(task, llama)[0].context == "{0} {x}\nQuestion: D. True, False or Neither?\nAnswer:"
    put(tmp_path / "RTE" / "dev.tsv", f"{PAIRS}\tlabel\n0\t{{0}} {{x}}\t%s\t1\n")
    (task,) = named("rte", llama, tmp_path)
    assert asked(task, llama)[0].context == "{0} {x}\nQuestion: %s True or False?\nAnswer:"


def test_solved_examples_are_drawn_as_the_harness_draws_them(tmp_path, llama):
    rows = "".join(f"{n}\tA {n}\tC\t{ENTAILED[n % 2]}\n" for n in range(9))
    for split in ("train", "dev"):
        put(tmp_path / "RTE" / f"{split}.tsv", f"{PAIRS}\tlabel\n{rows}")
    task = named("rte", llama, tmp_path, num_fewshot=2)[0]
    drawing = random.Random(1234)  # the harness's seed; one generator for all documents
    for document in task.documents:
        solved = drawing.sample(list(range(9)), 2)
        shots = "".join(f"A {n}\nQuestion: C True or False?\nAnswer: {('True', 'False')[n % 2]}\n\n" for n in solved)
        context = f"{shots}A {document['row']}\nQuestion: C True or False?\nAnswer:"
        assert asked(task, llama, document)[0].context == context
    assert task.num_fewshot == 2
    assert named("rte", llama, tmp_path, num_fewshot=2, seed=5)[0].shots != task.shots


def test_no_document_is_its_own_example(glue, llama):
    task = named("rte", llama, glue, num_fewshot=4, split="train")[0]
    assert all(len(places) == 4 and row not in places for row, places in enumerate(task.shots))


def test_mnlis_mismatched_part_takes_its_examples_from_the_one_train_file(glue, llama):
    task = named("mnli_mismatch", llama, glue, num_fewshot=1)[0]
    assert asked(task, llama)[0].context.count("Answer:") == 2


def test_a_model_answers_prompts(glue, llama, t5):
    for examinee in (llama, t5):
        (task,) = named("rte", examinee, glue)
        requests = asked(task, examinee)
        found = answer_all(examinee, requests)
        assert task.prediction(task.documents[0], found) == max((0, 1), key=lambda label: found[label][0])


# Predictions for the leaderboard


HANDED_IN = {
    "cola": ("CoLA.tsv", "0"),
    "sst2": ("SST-2.tsv", "0"),
    "mrpc": ("MRPC.tsv", "0"),
    "qqp": ("QQP.tsv", "0"),
    "mnli": ("MNLI-m.tsv", "entailment"),
    "mnli_mismatch": ("MNLI-mm.tsv", "entailment"),
    "qnli": ("QNLI.tsv", "entailment"),
    "rte": ("RTE.tsv", "entailment"),
    "wnli": ("WNLI.tsv", "0"),
    "stsb": ("STS-B.tsv", "0.000"),
    "ax": ("AX.tsv", "entailment"),
}


@pytest.mark.parametrize("name", HANDED_IN)
def test_predictions_for_test_files_are_in_the_leaderboards_format(glue, t5, tmp_path, name):
    (task,) = named(name, t5, glue, protocol="finetune", split="test")
    file, first = HANDED_IN[name]
    written = [task.task.written(number) for number in (range(len(task.task.names)) if task.task.names else (9, -3.2))]
    answers = [[(*written, "no label")[n % (len(written) + 1)]] for n in range(6)]
    assert task.metrics == {}
    assert task.score(task.documents[0], answers[0]) == {}
    assert task.target(task.documents[0]) is None
    (path,) = task.write(tmp_path, task.documents, answers)
    assert path == tmp_path / file
    lines = path.read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == list("012345")
    given = [line.split("\t")[1] for line in lines[1:]]
    named_labels = name in ("mnli", "mnli_mismatch", "qnli", "rte", "ax")
    shown = list(task.task.names) if named_labels else [str(n) for n in range(len(task.task.names))]
    if name == "stsb":
        shown = ["5.000", "0.000"]
    assert given == ([*shown, first] * 3)[:6]  # what is no label is handed in as the first one


def test_a_roberta_and_prompts_hand_in_likewise_and_only_for_test_files(glue, llama, roberta, tmp_path):
    stsb = named("stsb", roberta("number"), glue, split="test")[0]
    stsb.write(tmp_path, stsb.documents[:3], [[[5.2]], [[3.14159]], [[-0.2]]])
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t5.000\n1\t3.142\n2\t0.000\n"
    qnli = named("qnli", llama, glue, split="test")[0]
    qnli.write(tmp_path, qnli.documents[:1], [[[-3.0, False], [-1.0, False]]])
    assert (tmp_path / "QNLI.tsv").read_text() == "index\tprediction\n0\tnot_entailment\n"
    dev = named("qnli", llama, glue)[0]
    assert dev.write(tmp_path / "none", dev.documents, []) == []
    assert not (tmp_path / "none").exists()


def test_the_files_own_index_is_handed_in(llama, tmp_path):
    put(tmp_path / "RTE" / "test.tsv", f"{PAIRS}\n17\tA\tC\nx-4\tA\tC\n")
    (task,) = named("rte", llama, tmp_path, split="test")
    task.write(tmp_path, task.documents, [[[-1.0, False], [-2.0, False]]] * 2)
    assert (tmp_path / "RTE.tsv").read_text() == "index\tprediction\n17\tentailment\nx-4\tentailment\n"


def test_test_files_with_labels_are_scored_too(llama, tmp_path):
    put(tmp_path / "MRPC" / "test.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA\tC\n0\t7\t8\tA\tC\n")
    (task,) = named("mrpc", llama, tmp_path, split="test")
    answers = [[[-2.0, False], [-1.0, False]]] * 2
    assert scores(task, answers) == pytest.approx({"acc": 0.5, "f1": 2 / 3})
    assert task.write(tmp_path, task.documents, answers) == [tmp_path / "MRPC.tsv"]


def test_every_task_says_what_it_is(glue, llama, t5, roberta):
    for task, kind in (
        (named("rte", llama, glue)[0], "multiple_choice"),
        (named("rte", t5, glue, protocol="finetune")[0], "generate_until"),
        (named("rte", roberta(*ENTAILED), glue)[0], "label"),
    ):
        assert (task.output_type, task.name, task.alias, task.num_fewshot) == (kind, "rte", "rte", 0)
        json.dumps([dict(task.settings), *task.documents])
