"""Texts with a label: GLUE's nine tables as they are published, and files of one's own."""

import json

import pytest

from tests.datafiles import examples, refused
from train.data.examples import open_examples

MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\t"
)
MNLI_ROW = "0\t1\t1e\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tIt rains.\tIt is wet.\tneutral\t"
STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"

# A task's folder and file, texts, label and T5's form of a row.
GLUE = {
    "cola": ("CoLA/train.tsv", "gj04\t1\t\tIt rains.\ngj04\t0\t*\tRains it it.\n"),
    "sst-2": ("SST-2/train.tsv", "sentence\tlabel\nit rains \t1\nit pours \t0\n"),
    "mrpc": (
        "MRPC/train.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tIt rains.\tIt's raining.\r\n",
    ),
    "sts-b": ("STS-B/train.tsv", f"{STSB_HEADER}0\tnews\tf\t2012\t1\tnone\tnone\tIt rains.\tIt pours.\t3.733\n"),
    "qqp": ("QQP/train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tRain?\tWet?\t1\n"),
    "mnli": ("MNLI/train.tsv", f"{MNLI_HEADER}gold_label\n{MNLI_ROW}contradiction\n"),
    "qnli": ("QNLI/train.tsv", "index\tquestion\tsentence\tlabel\n0\tRain?\tIt rains.\tnot_entailment\n"),
    "rte": ("RTE/train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n"),
    "wnli": ("WNLI/train.tsv", "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\t0\n"),
}
READ = {
    "cola": (("It rains.",), 1, "cola sentence: It rains.", " acceptable"),
    "sst-2": (("it rains ",), 1, "sst2 sentence: it rains ", " positive"),
    "mrpc": (("It rains.", "It's raining."), 1, "mrpc sentence1: It rains. sentence2: It's raining.", " equivalent"),
    "sts-b": (("It rains.", "It pours."), 3.733, "stsb sentence1: It rains. sentence2: It pours.", " 3.8"),
    "qqp": (("Rain?", "Wet?"), 1, "qqp question1: Rain? question2: Wet?", " duplicate"),
    "mnli": (("It rains.", "It is wet."), 2, "mnli hypothesis: It is wet. premise: It rains.", " contradiction"),
    "qnli": (("Rain?", "It rains."), 1, "qnli question: Rain? sentence: It rains.", " not_entailment"),
    "rte": (("It rains.", "It is wet."), 0, "rte sentence1: It rains. sentence2: It is wet.", " entailment"),
    "wnli": (("It rains.", "It is wet."), 0, "wnli sentence1: It rains. sentence2: It is wet.", " not_entailment"),
}
NAMES = {
    "cola": ("unacceptable", "acceptable"),
    "sst-2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "sts-b": (),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
}


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("folder", ["", "elsewhere"])
def test_a_glue_table_is_told_by_its_header_and_read_for_every_kind_of_model(tmp_path, task, folder):
    name, content = GLUE[task]
    found = examples(tmp_path, content, name if not folder else f"{folder}/train.tsv")
    texts, label, prompt, response = READ[task]
    assert found.format == f"glue-{task}"
    assert found.kind == ("regression" if task == "sts-b" else "classification")
    assert found.label_names == NAMES[task]
    example = found[0]
    assert (example.texts, example.label, example.prompt, example.response) == (texts, label, prompt, response)
    assert example.messages[-1]["content"] == response.strip()
    assert example.where == f"{found.path}:{1 if task == 'cola' else 2}"
    assert found[-1].label == {"cola": 0, "sst-2": 0}.get(task, label)


def test_mnlis_dev_files_have_more_columns_and_read_alike(tmp_path):
    content = f"{MNLI_HEADER}label2\tlabel3\tlabel4\tlabel5\tgold_label\n{MNLI_ROW}a\tb\tc\td\tneutral\n"
    found = examples(tmp_path, content, "dev_matched.tsv")
    assert found.format == "glue-mnli"
    assert (found[0].label, found[0].texts) == (1, ("It rains.", "It is wet."))


@pytest.mark.parametrize(
    "header",
    [
        "index\tsentence",
        "index\tquestion\tsentence",
        "index\tsentence1\tsentence2",
        "id\tquestion1\tquestion2",
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
        STSB_HEADER.rpartition("\t")[0],
        MNLI_HEADER.rpartition("\tlabel1")[0],
    ],
)
def test_a_test_file_has_no_labels_to_learn(tmp_path, header):
    row = "\t".join("a" * (header.count("\t") + 1))
    refused(tmp_path, f"{header}\n{row}\n", "test.tsv has no labels, as GLUE's test files; train on", "test.tsv")


def test_quotes_in_glue_are_characters_unless_a_writer_put_them_there(tmp_path):
    rows = '0\t"A" is first.\tHe said "so.\tentailment\n1\t"Say ""A"" now"\t"whole"\tentailment\n'
    found = examples(tmp_path, f"index\tsentence1\tsentence2\tlabel\n{rows}", "RTE/train.tsv")
    assert [e.texts for e in found] == [('"A" is first.', 'He said "so.'), ('Say "A" now', '"whole"')]
    long = '"' + '""' * 40_000 + 'x"y"'
    assert examples(tmp_path, f"sentence\tlabel\n{long}\t1\n", "SST-2/train.tsv")[0].texts == (long,)


def test_rte_and_wnli_are_told_apart_by_labels_and_a_folders_name_comes_first(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel\n"
    assert examples(tmp_path, f"{header}0\ta\tb\t1\n", "x.tsv").format == "glue-wnli"
    assert examples(tmp_path, f"{header}0\ta\tb\tentailment\n", "x.tsv").format == "glue-rte"
    refused(tmp_path, f"{header}0\ta\tb\tmaybe\n", "x.tsv:2: label is 'maybe'; rte's are 0 or entailment", "RTE/x.tsv")
    found = examples(tmp_path, f"{header}0\ta\tb\tmaybe\n", "x.tsv")
    assert (found.format, found.label_names) == ("classification", ("maybe",))


def test_a_named_task_is_read_from_json_too(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": label, "idx": 0} for label in (1, "entailment")]
    found = examples(tmp_path, rows, format="glue-rte")
    assert [e.label for e in found] == [1, 0]
    assert str(found[0].prompt) == "rte sentence1: a sentence2: b"
    assert examples(tmp_path, [{"sentence": "a", "label": 0}], format="glue-cola")[0].response == " unacceptable"
    refused(tmp_path, [{"sentence": "a"}], r"expected keys .*found sentence", format="glue-cola")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rte", "1\ta\tb\tperhaps", "label is 'perhaps'; rte's are 0 or entailment, 1 or not_entailment"),
        ("rte", "1\ta\tb", r"has another number of fields \(3\) than the header \(4\)"),
        ("rte", "1\t \t\tentailment", "sentence1 and sentence2 are empty"),
        ("sst-2", "a\t2", "label is '2'; sst-2's are 0 or negative, 1 or positive"),
        ("sts-b", "1\tg\tf\t2\t1\tn\tn\ta\tb\t5.5", "score is '5.5'; a score from 0 to 5 is needed"),
        ("sts-b", "1\tg\tf\t2\t1\tn\tn\ta\tb\tnan", "score is 'nan'"),
        ("sts-b", "1\tg\tf\t2\t1\tn\tn\ta\tb\t", "score is ''"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_their_line(tmp_path, name, row, message):
    path, content = GLUE[name]
    line = content.count("\n") + 1
    refused(tmp_path, f"{content}{row}\n", f"train.tsv:{line}: {message}", path)


def test_the_broken_rows_of_the_published_qqp_are_passed_over_and_counted(tmp_path):
    path, content = GLUE["qqp"]
    found = examples(tmp_path, f"{content}5\tbroken\tacross\n6\t1\t2\ta\tb\t0\n", path)
    assert [e.label for e in found] == [1, 0]
    assert found[1].where == f"{found.path}:4"
    assert [s.count for s in found.skipped] == [1]


# Files of one's own


def test_classes_by_name_are_numbered_in_sorted_order_over_the_whole_file(tmp_path):
    found = examples(tmp_path, [{"text": f"t{n}", "label": label} for n, label in enumerate("cab")])
    assert (found.format, found.kind, found.label_names) == ("classification", "classification", ("a", "b", "c"))
    assert [e.label for e in found] == [2, 0, 1]
    assert (found[0].texts, found[0].prompt, found[0].response) == (("t0",), "text: t0", " c")


def test_classes_by_number_keep_their_number_though_some_are_missing(tmp_path):
    pairs = [{"premise": "a", "hypothesis": "b", "label": label} for label in (3, 1)]
    found = examples(tmp_path, pairs)
    assert found.label_names == ("0", "1", "2", "3")
    assert [e.label for e in found] == [3, 1]
    assert found[0].prompt == "premise: a hypothesis: b"
    table = examples(tmp_path, "text,label\na,2\nb,0\n", "my.csv")
    assert [e.label for e in table] == [2, 0]
    mixed = examples(tmp_path, "text,label\na,2\nb,none\n", "my.csv")
    assert (mixed.label_names, [e.label for e in mixed]) == (("2", "none"), [0, 1])
    assert [e.label for e in examples(tmp_path, [{"text": "a", "label": True}, {"text": "b", "label": False}])] == [
        1,
        0,
    ]


def test_a_score_is_a_number_to_foretell(tmp_path):
    found = examples(tmp_path, "text,score\na,2.5\nb,-1e3\n", "my.csv")
    assert (found.format, found.kind, found.label_names) == ("regression", "regression", ())
    assert [e.label for e in found] == [2.5, -1000.0]
    assert found[1].response == " -1000"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "label": 1.5}, "label is 1.5; a class is a text or a whole number from 0 to 999. A number"),
        ({"text": "a", "label": -1}, "label is -1"),
        ({"text": "a", "label": 1000}, "label is 1000"),
        ({"text": "a", "label": None}, "label is null"),
        ({"text": "a", "label": " "}, "label is a text"),
        ({"text": "a", "label": ["b"]}, "label is a list"),
        ({"text": " ", "label": 1}, "text is empty"),
        ({"sentence1": "a", "sentence2": None, "label": 1}, "sentence2 is null"),
        ({"text": "a", "score": "high"}, "score is 'high'; a number is needed"),
        ({"text": "a", "score": None}, "score is None; a number is needed"),
        ({"text": "a", "score": float("inf")}, "score is inf"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, record, message):
    refused(tmp_path, [record], f"my.jsonl:1: {message}")


def test_a_file_of_one_class_of_json_reads_again_from_its_index(tmp_path):
    rows = [{"sentence": f"s{n}", "label": "ab"[n % 2]} for n in range(50)]
    found = examples(tmp_path, json.dumps(rows), "my.json")
    assert [found[n].label for n in (49, 0, 25)] == [1, 0, 1]
    assert [e.texts for e in open_examples(found.path)][-1] == ("s49",)
