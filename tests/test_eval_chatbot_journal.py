"""A journal loses nothing that was written, and takes nothing for a row that is none."""

import json

import pytest

from eval.chatbot.journal import Journal
from models import DataError
from models.errors import WriteError


def journal(path):
    return Journal(path, key=lambda row: str(row["id"]))


def test_rows_are_appended_and_found_again(tmp_path):
    first = journal(tmp_path / "new" / "rows.jsonl")
    first.append({"id": 2, "text": "é\u2028\ud800"})
    first.close()
    again = journal(tmp_path / "new" / "rows.jsonl")
    again.append({"id": 1})
    assert again.rows == {"2": {"id": 2, "text": "é\u2028\ud800"}, "1": {"id": 1}}
    again.close()


def test_the_finished_file_is_in_order_and_the_last_row_of_a_key_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = journal(path)
    for row in ({"id": 2}, {"id": 1, "n": 1}, {"id": 9}, {"id": 1, "n": 2}):
        rows.append(row)
    rows.finish(["1", "2", "3"])
    rows.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": 1, "n": 2}, {"id": 2}, {"id": 9}]


def test_half_a_last_line_is_cut_off_wherever_the_kill_came(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole, half = b'{"id": 1}\n', b'{"id": 2, "text": "\xc3\xa9"}'
    for size in range(1, len(half)):
        path.write_bytes(whole + half[:size])
        rows = journal(path)
        assert list(rows.rows) == ["1"]
        rows.append({"id": 3})
        rows.close()
        assert path.read_bytes() == whole + b'{"id": 3}\n'


def test_a_last_row_that_only_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2}')
    rows = journal(path)
    rows.append({"id": 3})
    rows.close()
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2}\n{"id": 3}\n'


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'"id"', b"{}", b"7", b"\xff"])
def test_a_line_that_is_no_row_is_refused_and_nothing_is_changed(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content := b'{"id": 1}\n' + line + b'\n{"id": 2}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is not a row that this command wrote"):
        journal(path)
    assert path.read_bytes() == content
    path.write_bytes(b"")
    journal(path).close()  # the refusal has let the file go


def test_one_process_at_a_time(tmp_path):
    first = journal(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="another process is writing it"):
        journal(tmp_path / "rows.jsonl")
    first.close()
    journal(tmp_path / "rows.jsonl").close()


def test_no_empty_file_stays(tmp_path):
    journal(tmp_path / "rows.jsonl").close()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"rows\.jsonl: cannot be written \((Not a directory|File exists)\)"):
        journal(tmp_path / "file" / "rows.jsonl")
