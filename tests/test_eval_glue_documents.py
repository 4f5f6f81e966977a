"""GLUE's official files as documents: where they lie, what is read of a row, what is refused."""

import logging
import os
from pathlib import Path

import pytest

from eval.glue.documents import PARTS, documents, needed
from models.errors import ConfigError, DataError
from tests import glue_folder
from tests.glue_folder import MNLI, MNLI_ROW, PAIRS, put

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None
FIRST = {  # texts and label of the first labelled row
    "cola": (["A C"], 1),
    "sst2": (["A C "], 0),
    "mrpc": (["A C", "D"], 1),
    "stsb": (["A C", "A D E"], 0.0),
    "qqp": (["A", "C"], 0),
    "mnli": (["A C 0", "D"], 0),
    "mnli_mismatch": (["A C 0", "D"], 0),
    "qnli": (["A", "C D"], 0),
    "rte": (["A C", "D"], 0),
    "wnli": (["A C", "D"], 1),
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return glue_folder.write(tmp_path_factory.mktemp("glue"))


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("split", ["dev", "train", "test"])
def test_every_official_file_is_read(glue, name, split):
    if (name, split) == ("mnli_mismatch", "train"):
        with pytest.raises(ConfigError, match="mnli_mismatch has no split 'train'; it has dev, test"):
            needed(PARTS[name], glue, split)
        return
    found = needed(PARTS[name], glue, split)
    assert found.labelled == (split != "test")
    assert [row["row"] for row in found.rows] == [row["idx"] for row in found.rows] == list(range(6))
    if split != "test":
        assert (found.rows[0]["texts"], found.rows[0]["label"]) == FIRST[name]
        assert len({row["label"] for row in found.rows}) == max(len(found.part.task.names), 2) + (name == "stsb")
    else:
        assert {row["label"] for row in found.rows} == {None}
        assert all(len(row["texts"]) == len(found.part.task.texts) for row in found.rows)


def test_the_parts_of_mnli_and_the_diagnostics_have_files_of_their_own(glue, tmp_path):
    assert needed(PARTS["mnli"], glue, "dev").path.name == "dev_matched.tsv"
    assert needed(PARTS["mnli_mismatch"], glue, "test").path.name == "test_mismatched.tsv"
    assert needed(PARTS["ax"], glue, "test").path == glue / "AX" / "diagnostic.tsv"
    put(tmp_path / "MNLI" / "dev.tsv", f"index\tsentence1\tsentence2\tgold_label\n{7}\tA\tC\tneutral\n")
    assert needed(PARTS["mnli"], tmp_path, "dev").rows == [{"row": 0, "idx": 7, "texts": ["A", "C"], "label": 1}]
    assert documents(PARTS["mnli_mismatch"], tmp_path, "dev") is None


@pytest.mark.parametrize("folder", ["RTE", "rte", "Rte"])
@pytest.mark.parametrize("given", ["all", "own", "file"])
def test_a_folder_for_all_one_for_a_task_or_a_file_will_do(tmp_path, folder, given):
    file = put(tmp_path / folder / "DEV.tsv", f"{PAIRS}\tlabel\r\n0\tA\tC\tentailment\r\n")
    data = {"all": tmp_path, "own": tmp_path / folder, "file": file}[given]
    assert needed(PARTS["rte"], data, "dev").rows[0]["label"] == 0
    named_only = given == "file"
    assert (documents(PARTS["rte"], data, "dev", named=False) is None) == named_only


def test_folders_go_by_names_without_a_hyphen_too_and_any_name_will_do_for_a_named_task(tmp_path):
    put(tmp_path / "sst2" / "dev.tsv", "sentence\tlabel\nA\t1\n")
    assert needed(PARTS["sst2"], tmp_path, "dev").rows[0]["label"] == 1
    put(tmp_path / "mine" / "dev.tsv", "sentence\tlabel\nC\t0\n")
    assert needed(PARTS["sst2"], tmp_path / "mine", "dev").rows[0]["label"] == 0
    assert documents(PARTS["sst2"], tmp_path / "mine", "dev", named=False) is None
    with pytest.raises(DataError, match=r"sst2 has no dev.tsv for qnli; give the folder that holds QNLI, or QNLI"):
        needed(PARTS["qnli"], tmp_path / "sst2", "dev")  # another task's own folder


def test_the_paraphrases_are_read_under_the_names_that_microsoft_gave_them(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    for name in ("train", "test"):
        put(tmp_path / "MRPC" / f"msr_paraphrase_{name}.txt", f'{header}1\t7\t8\tHe said "A.\tC\r\n')
    assert needed(PARTS["mrpc"], tmp_path, "train").rows[0]["texts"] == ['He said "A.', "C"]
    test = needed(PARTS["mrpc"], tmp_path, "test")
    assert (test.labelled, test.rows[0]["label"]) == (True, 1)  # these were published


def test_the_marks_of_colas_judges_do_not_make_a_header(tmp_path):
    put(tmp_path / "CoLA" / "dev.tsv", "ad03\t0\t?*\tA C.\nad03\t1\t\tD.\n")
    found = needed(PARTS["cola"], tmp_path, "dev").rows
    assert [(row["texts"], row["label"]) for row in found] == [(["A C."], 0), (["D."], 1)]


def test_the_broken_rows_of_the_published_qqp_are_left_out_but_none_of_a_test_file(tmp_path, caplog):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    put(tmp_path / "QQP" / "dev.tsv", f"{header}3\t1\t2\tA\tC\t1\n4\tbroken\n9\t1\t2\tA\tC\t0\n")
    with caplog.at_level(logging.WARNING):
        assert [row["idx"] for row in needed(PARTS["qqp"], tmp_path, "dev").rows] == [3, 9]
    assert "1 rows with another number of fields are left out" in caplog.text
    put(tmp_path / "QQP" / "test.tsv", "id\tquestion1\tquestion2\n0\tA\tC\n1\tbroken\n")
    with pytest.raises(DataError, match=r"test.tsv:3: has another number of fields \(2\) than the header \(3\)"):
        needed(PARTS["qqp"], tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rte", "", "dev.tsv is empty; at least one row is needed"),
        ("rte", f"{PAIRS}\tlabel\n", "dev.tsv is empty; at least one row is needed"),
        ("rte", f"{PAIRS}\tlabel\n0\tA\tC\tmaybe\n", "dev.tsv:2: label is 'maybe'; rte's are 0 or entailment"),
        ("rte", f"{PAIRS}\tlabel\n0\tA\tC\n", r"dev.tsv:2: has another number of fields \(3\)"),
        ("rte", f"{PAIRS}\n0\tA\tC\n", "dev.tsv:2: has no column label, so there is nothing to score by; test files"),
        ("rte", "question\tlabel\nA\t1\n", "has no column sentence1 or sentence2, as rte has; found question, label"),
        ("sts-b", f"{PAIRS}\tscore\n0\tA\tC\t5.1\n", "dev.tsv:2: score is '5.1'; a score from 0 to 5 is needed"),
        ("mnli", f"{MNLI}\tgold_label\n{MNLI_ROW.format(0)}\t-\n", "gold_label is '-'; mnli's are 0 or entailment, 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_its_line(tmp_path, name, content, says):
    put(tmp_path / name / "dev.tsv", content)
    with pytest.raises(DataError, match=says):
        needed(PARTS[name.replace("-", "")], tmp_path, "dev")


def test_json_lines_need_every_label_and_text(tmp_path):
    path = put(tmp_path / "mine.jsonl", '{"sentence1": "A", "sentence2": "C", "label": 1}\n')
    assert needed(PARTS["rte"], path, "dev").rows == [{"row": 0, "idx": 0, "texts": ["A", "C"], "label": 1}]
    for line, says in (
        ('{"sentence1": "A", "sentence2": "C"}', "mine.jsonl:2: label is missing, which the rows before have"),
        ('{"sentence1": "A", "sentence2": null, "label": 1}', "mine.jsonl:2: sentence2 is null; text is needed"),
        ('{"sentence1": "A", "label": 1}', "mine.jsonl:2: sentence2 is missing; text is needed"),
    ):
        put(path, '{"sentence1": "A", "sentence2": "C", "label": 1}\n' + line + "\n")
        with pytest.raises(DataError, match=says):
            needed(PARTS["rte"], path, "dev")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist; give a folder with GLUE's data"):
        needed(PARTS["rte"], tmp_path / "nowhere", "dev")
    with pytest.raises(DataError, match=r"has no dev_matched.tsv or dev.tsv for mnli; give the folder that holds MNLI"):
        needed(PARTS["mnli"], tmp_path, "dev")


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with GLUE's data")
@pytest.mark.parametrize(("name", "rows"), [("cola", 516), ("sst2", 872), ("stsb", 1500), ("rte", 277)])
def test_the_published_files_are_read_whole(name, rows):
    assert SHARED is not None
    found = needed(PARTS[name], SHARED / "assets" / "data" / "glue", "dev")
    assert len(found.rows) == rows
    assert found.labelled
