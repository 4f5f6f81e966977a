"""The benchmark of data reads what it writes, and its figures are those of what it measures."""

import json

from benchmarks import data
from train.data.examples import open_examples


def test_files_of_each_kind_hold_the_same_records(tmp_path):
    paths = [data.written(tmp_path, kind, 5) for kind in ("jsonl", "json", "csv")]
    first, *others = [[example.response for example in open_examples(path)] for path in paths]
    assert len(set(first)) == 5
    assert others == [first, first]


def test_every_figure_is_there_and_packing_leaves_least_padding(tmp_path, capsys):
    out = tmp_path / "data.json"
    arguments = ["--records", "40", "--lengths", "3000", "--texts", "6", "--repeats", "1", "--out", str(out)]
    assert data.main(arguments) == 0
    found = json.loads(out.read_text())
    assert [row["file"] for row in found["files"]] == ["jsonl", "json", "csv"]
    assert all(row["megabytes_per_second"] > 0 < row["peak_memory"] for row in found["files"])
    plain, grouped, _, packed = (row["padding"] for row in found["orders"])
    assert plain > grouped > packed >= 0
    assert all(row["tokens_per_second"] > 0 for row in found["steps"])
    assert "packed, 2 rows of 512" in capsys.readouterr().out
