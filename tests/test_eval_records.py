"""Finding the records of a file and reading one: any size, any bytes, and memory that does not grow with the file."""

import csv
import io
import json
import os
import tracemalloc
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.data import json_records, stream
from eval.data.records import RecordFile, printable
from models.errors import ConfigError, DataError
from train.data.examples import open_examples

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
record_lists = st.lists(st.dictionaries(texts, json_values, max_size=4), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def written(folder, content, name):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def scanned(path, **options):
    file = RecordFile(path, **options)
    return file, list(file.scan())


# Finding and reading


@pytest.mark.parametrize(("exact", "kept"), [(False, "one\ntwo"), (True, "one\r\ntwo")])
def test_windows_line_ends_within_a_field_stay_where_that_is_wanted(folder, exact, kept):
    content = 'text,label\r\n"one\r\ntwo",1\r\nthree,2\r\n'
    file, found = scanned(written(folder, content, "ends.csv"), exact=exact)
    assert found == [{"text": kept, "label": "1"}, {"text": "three", "label": "2"}]
    assert [file[number] for number in range(len(file))] == found


@given(records=record_lists, indent=st.none() | st.integers(0, 2), ascii=st.booleans(), ends=st.sampled_from("\n\r"))
def test_every_record_is_found_and_read_again_from_lines_and_lists(folder, records, indent, ascii, ends):
    end = "\r\n" if ends == "\r" else "\n"
    lines = end.join(json.dumps(record, ensure_ascii=ascii) for record in records)
    whole = json.dumps(records, ensure_ascii=ascii, indent=indent).replace("\n", end)
    for content, name in ((lines, "my.jsonl"), (whole, "my.json"), ("\ufeff" + whole, "mark.json")):
        file, found = scanned(written(folder, content, name))
        assert found == records
        assert [file[number] for number in range(len(file))] == records
        assert file.sha256 == sha256(content.encode()).hexdigest()
        assert file.size == len(content.encode())


@settings(max_examples=30)
@given(records=record_lists, window=st.integers(1, 40))
def test_a_list_is_read_alike_through_a_window_of_any_size(folder, records, window):
    content = json.dumps(records, ensure_ascii=False, indent=1)
    path = written(folder, content, "window.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "WINDOW", window)
        file, found = scanned(path)
    assert found == records
    lines = content.split("\n")
    assert all(lines[line - 1].startswith(" {") for line in file.lines)
    raw = content.encode()
    places = zip(file.starts, file.sizes, strict=True)
    assert [json.loads(raw[start : start + size]) for start, size in places] == records


def test_numbers_and_literals_are_not_cut_by_the_windows_end(folder, monkeypatch):
    path = written(folder, '[{"a": 12345, "b": true, "c": "\\ud83d\\ude00é"} , {"a": -1.5e10}]', "cut.json")
    for window in range(1, 60):
        monkeypatch.setattr(json_records, "WINDOW", window)
        assert scanned(path)[1] == [{"a": 12345, "b": True, "c": "😀é"}, {"a": -1.5e10}]
        task = written(folder, '{\n"a": 12345,\n"Instances": [{"b": 1}]\n}', "task.json")
        assert scanned(task)[1] == [{"a": 12345, "Instances": [{"b": 1}]}]


# NUL and lone carriage returns are no business of a table's.
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=6), tabs=st.booleans())
def test_every_row_of_a_table_is_found_and_read_again(folder, rows, tabs):
    text = io.StringIO(newline="")
    writer = csv.writer(text, "excel-tab" if tabs else "excel")
    writer.writerows([("a", "b"), *rows])
    file, found = scanned(written(folder, text.getvalue(), "my.tsv" if tabs else "my.csv"))
    expected = [{"a": a, "b": b} for a, b in rows]
    assert found == expected
    assert [file[number] for number in range(len(file))] == expected


def test_a_table_without_quotes_has_a_row_a_line_and_keeps_quotes(folder):
    content = 'a\tb\r\n"x\ty"\r\n"He said ""no"""\t"whole"\r\n'
    file, found = scanned(written(folder, content, "plain.tsv"), plain=True)
    assert found == [{"a": '"x', "b": 'y"'}, {"a": 'He said "no"', "b": '"whole"'}]
    assert [file[number] for number in range(2)] == found


def test_a_table_can_be_without_a_header(folder):
    file, found = scanned(written(folder, "1\t2\n3\t4\n", "bare.tsv"), columns=("a", "b"), plain=True)
    assert found == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert list(file.lines) == [1, 2]


def test_an_object_gives_its_instances_with_what_they_share_wherever_that_stands(folder):
    content = '{\n"Definition": "d",\n"Instances": [\n{"input": 1},\n{"input": 2}],\n"URL": ["u"]\n}\n'
    file, found = scanned(written(folder, content, "task.json"))
    shared = {"Definition": "d", "URL": ["u"]}
    assert found == [{**shared, "Instances": [{"input": 1}]}, {**shared, "Instances": [{"input": 2}]}]
    assert [file[number] for number in range(2)] == found
    assert list(file.lines) == [4, 5]


def test_an_object_without_instances_is_one_record(folder):
    for content in ('{\n"prompt": "a",\n"completion": "b"\n}\n', '{"prompt": "a", "completion": "b"}'):
        file, found = scanned(written(folder, content, "one.json"))
        assert found == [file[0]] == [{"prompt": "a", "completion": "b"}]


def test_a_file_that_changed_is_not_read_as_if_it_had_not(folder):
    path = written(folder, '{"a": 1}\n{"a": 2}\n', "changing.jsonl")
    file, _ = scanned(path)
    path.write_text('{"b": 100}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"changing.jsonl has changed since it was opened"):
        file[1]


# Refusals


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b'[{"a": 1}] x', "my.json", "my.json:1: is not JSON .something follows the end of the list"),
        (b'[{"a": 1}]\n[{"a": 1}]', "my.json", "my.json:2: .*something follows the end of the list"),
        (b'{\n"a": 1\n}\n{\n"a": 2\n}', "my.json", "my.json:4: .*something follows the end of the object"),
        (b'{\n"a" 1\n}', "my.json", "my.json:2: .*expected a colon after a key"),
        (b'{\n"a": 1\n', "my.json", "my.json:3: expected a comma or } after a key's value; the file may be cut"),
        (b"{\n1: 1\n}", "my.json", "my.json:2: .*a key is no text"),
        (b'[{"a": 1},\n{"a": "b\xc3"}]', "my.json", "my.json:2: is not UTF-8 .byte 0xc3 at offset 19"),
        (b'[{"a": 1},\n{"a": "b\xc3', "my.json", "my.json:2: is not UTF-8 .byte 0xc3 at offset 19"),
        (b'{"a": 1}\n{"a": "\xe2\x82"}', "my.jsonl", "my.jsonl:2: is not UTF-8 .byte 0xe2 at offset 16"),
        (b'\xef\xbb\xbf{"a": 1}\n\xff', "my.jsonl", "my.jsonl:2: is not UTF-8 .byte 0xff at offset 12"),
        (b"a,b\n\xff,c", "my.csv", "my.csv:2: is not UTF-8 .byte 0xff at offset 4"),
        (b"\x1f\x8b\x08\x00", "my.jsonl", "my.jsonl is compressed by gzip; unpack it"),
        (b"PAR1\x15\x04", "my.json", "my.json is a Parquet file; write its rows as JSON lines"),
        (b"a,a\n1,2", "my.csv", "my.csv:1: the header names the column 'a' twice"),
        (b'a,b\n1,"2\n3\n4', "my.csv", "my.csv:2: is not CSV"),
        (b'[{"a": ' + b"1" * 5000 + b"}]", "my.json", "my.json:1: is not JSON .*4300"),
        (b'[{"a": "' + b"x" * 3_000_000, "my.json", "my.json:1: is not JSON .Unterminated.* cut off"),
        (b'[{"a": "x"},\n{"a": tru' + b'}, {"a": "y"}' * 200_000, "my.json", r"my.json:2: is not JSON .[^;]*$"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(folder, content, name, message):
    with pytest.raises(DataError, match=message):
        scanned(written(folder, content, name))


def test_a_pipe_cannot_be_read_twice_and_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe.jsonl is not a regular file"):
        open_examples(tmp_path / "pipe.jsonl")


def test_an_error_near_the_front_of_a_large_list_is_told_without_reading_it_all(folder, monkeypatch):
    monkeypatch.setattr(json_records, "WINDOW", 1000)
    path = written(folder, '[{"a" 1},' + '{"a": "y"},' * 100_000, "early.json")
    read = []
    piece = stream.Stream.piece
    monkeypatch.setattr(stream.Stream, "piece", lambda self, size: read.append(size) or piece(self, size))
    with pytest.raises(DataError, match=r"early.json:1: is not JSON"):
        scanned(path)
    assert sum(read) < 5000


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('[{"a": "' + "x" * 9000, "my.json"),
        ('{"a": "' + "x" * 9000 + "\n", "my.jsonl"),
        ('a,b\n1,"' + "x\n" * 9000, "my.csv"),
    ],
)
def test_a_record_without_an_end_does_not_fill_the_memory(folder, monkeypatch, content, name):
    for module in (stream, json_records):
        monkeypatch.setattr(module, "LONGEST", 5000)
    monkeypatch.setattr("eval.data.tables.LONGEST", 5000)
    monkeypatch.setattr(json_records, "WINDOW", 1000)
    with pytest.raises(DataError, match=rf"{name}:[12]: a record that begins here has no end within"):
        scanned(written(folder, content, name))


# Memory


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.csv"])
def test_memory_stays_far_below_the_size_of_a_file(folder, name):
    count, text = 1_500, "words and more words, " * 950
    path = folder / name
    with open(path, "w", newline="") as file:
        if name == "big.csv":
            file.write("prompt,completion\n")
            file.writelines(f'p{number},"{text}"\n' for number in range(count))
        else:
            lines = (json.dumps({"prompt": f"p{number}", "completion": text}) for number in range(count))
            opening, between, closing = ("[", ",\n", "]") if name == "big.json" else ("", "\n", "\n")
            file.write(opening)
            for number, line in enumerate(lines):
                file.write((between if number else "") + line)
            file.write(closing)
    size = path.stat().st_size
    assert size > 30e6
    tracemalloc.start()
    try:
        examples = open_examples(path)
        read = [examples[number].prompt for number in (count - 1, 0, 700)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    path.unlink()
    assert len(examples) == count
    assert read == [f"p{count - 1}", "p0", "p700"]
    assert peak < size / 4, f"{peak / 1e6:.1f} MB for a file of {size / 1e6:.1f} MB"
    sources = examples.sources.files[0]
    assert sum(it.itemsize for it in (sources.starts, sources.sizes, sources.lines)) == 20


# Whatever is in a file


VALID = [
    ("my.jsonl", '{"instruction": "é", "output": "b"}\n{"instruction": "c", "input": null, "output": "d"}\n'),
    ("my.json", '[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]'),
    ("my.json", '{\n"Definition": ["d"],\n"Positive Examples": [],\n"Instances": [{"input": "a", "output": ["b"]}]\n}'),
    ("my.jsonl", '{"instruction": "a", "instances": [{"input": "b", "output": "c"}]}\n'),
    ("my.jsonl", '{"instruction": "a", "instances": [{"instruction_with_input": "b", "output": "c"}]}\n'),
    ("my.jsonl", '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": ""}\n'),
    ("my.jsonl", '{"text": "<human>: a\\n<bot>: b"}\n{"text": "### Human: a### Assistant: b"}\n'),
    ("my.jsonl", '{"message_id": "a", "parent_id": null, "role": "prompter", "text": "q", "rank": null}\n'),
    ("my.jsonl", '{"prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b"}]}}\n'),
    ("my.csv", 'text,label\n"a, b",x\nc,y\n'),
    ("my.tsv", "sentence\tlabel\na\t1\nb\t0\n"),
    ("my.tsv", "x\t1\t\tgood\nx\t0\t*\tbad\n"),
    ("my.tsv", "index\tsentence1\tsentence2\tscore\tgenre\n0\ta\tb\t3.5\tg\n"),
    ("my.json", '[{"sentence1": "a", "sentence2": "b", "label": 3}, {"premise": "a", "hypothesis": "", "label": "x"}]'),
]
odd = st.sampled_from([b'"', b"\n", b"\t", b",", b"[", b"]", b"{", b"}", b"\\", b"\xff", b"null", b"1e999", b"\\ud800"])


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    chosen=st.sampled_from(VALID),
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 12), st.binary(max_size=3) | odd), max_size=4),
)
def test_a_damaged_file_reads_or_is_refused_and_nothing_else(folder, chosen, edits):
    name, content = chosen
    raw = content.encode()
    for place, removed, added in edits:
        place %= len(raw) + 1
        raw = raw[:place] + added + raw[place + removed :]
    reads_or_is_refused(written(folder, raw, name))


@settings(max_examples=200)
@given(raw=st.binary(max_size=60), name=st.sampled_from(["my.json", "my.jsonl", "my.csv", "my.tsv", "my.txt"]))
def test_any_bytes_read_or_are_refused_and_nothing_else(folder, raw, name):
    reads_or_is_refused(written(folder, raw, name))


KNOWN = (
    *("messages", "prompt", "completion", "instruction", "output", "instances", "text", "label", "score", "chosen"),
    *("rejected", "message_id", "parent_id", "role", "sentence1", "sentence2"),
    *("Definition", "Instances", "Positive Examples"),
)
known_records = st.dictionaries(st.sampled_from(KNOWN), json_values, min_size=2, max_size=6)


@settings(max_examples=150)
@given(records=st.lists(known_records, min_size=1, max_size=3))
def test_any_values_under_known_keys_read_or_are_refused(folder, records):
    reads_or_is_refused(written(folder, json.dumps(records), "my.json"))


def reads_or_is_refused(path):
    message, examples = "", []
    try:
        examples = open_examples(path)
    except (DataError, ConfigError) as refusal:
        message = str(refusal)
    assert bool(examples) != message.startswith("data: ")
    assert not any(mark in message for mark in "\x1b\x00\x07")
    for example in examples:
        assert example.opening is not None
        assert example.where.startswith(f"{path}:")


def test_control_characters_are_written_out_for_a_terminal():
    assert printable("a\x1b[31mb\r\nc\td\u202e\x9b") == r"a\x1b[31mb\r" "\nc\td" r"\u202e\x9b"
    assert printable("é😀\u200d") == "é😀\u200d"
