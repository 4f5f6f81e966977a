"""WikiText as the harness takes it: pages, ordinary writing, and a long text in windows that add up."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.data.texts import read_documents, read_text, text_file
from eval.likelihood import likelihood, rolling
from eval.perplexity import FAMILY
from eval.task import Spec
from eval.wikitext import articles, detokenized, rows, tightened
from models import ConfigError, DataError
from tests import tiny
from tests.examining import examinee, log_probability, scores, values

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None

RAW = (
    " \n = The Red Dog = \n \n The dog @-@ house ( of 3 @,@ 000 m ) was red . It 's small , but the dogs ' own . \n"
    " \n = = Size = = \n \n It was 3 @.@ 5 m tall ; was it ? \n \n = = = Height = = = \n \n Tall ! \n"
    " \n = A Second Page = \n \n One line : short . \n \n"
)


@pytest.fixture(scope="module")
def who(tmp_path_factory):
    return examinee(tiny.checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text(RAW)
    return path


def build(who, data, name="wikitext", **options):
    return FAMILY.build(Spec(name=name, examinee=who, data=data, **options))


@pytest.mark.parametrize(
    ("stored", "written"),
    [
        ("the dogs ' house", "the dogs' house"),
        ("a well @-@ known 3 @,@ 000 m @.@ x", "a well-known 3,000 m.x"),
        ("one , two ; three : four . Five ! Six ? Seven", "one, two; three: four. Five! Six? Seven"),
        ("kept at the end .", "kept at the end ."),
        ("( 60 cm ) [ 3 ] { x }", "(60 cm) [3] {x}"),
        ("( two ( one ) two )", "(two ( one) two )"),  # a pair ends at the first closing bracket
        ("( never closed", "( never closed"),
        ('the " lobster red " one', 'the "lobster red" one'),
        ('three " marks " are " odd', 'three "marks" are " odd'),
        ("it ' quoted ' so", "it 'quoted' so"),
        ("he 's here", "he's here"),
        ("don't , they can't", "don't, they can't"),
        ("Ann ' left and Mary ' goes", "Ann 'left and Mary' goes"),  # two apostrophes are a pair
        (" = Title = ", " = Title = "),
        (" = = Section = = ", " == Section == "),
        (" = = = Part = = = ", " === Part === "),
        (" = = = = Deep = = = = ", " ==== Deep ==== "),
        ("5 \N{DEGREE SIGN} C", "5\N{DEGREE SIGN}C"),
        (" \n a \n b", "\na\nb"),
        ("about N people", "about 1 people"),
        ("/' 5/", "/'[0-9]/"),  # the harness's slip
        ("' 5 years", "' 5 years"),
        ("", ""),
    ],
)
def test_a_stored_page_is_put_back_into_ordinary_writing(stored, written):
    assert detokenized(stored) == written


marks = st.text(st.sampled_from("()[]{}\"' \t\na\u2003\u00a0\x1c@"), max_size=30)


@given(marks, st.sampled_from(["()", "[]", "{}", '""', "''"]))
def test_marks_are_tightened_as_a_regular_expression_would(text, pair):
    opening, closing = map(re.escape, pair)
    pattern = rf"{opening}\s*([^{closing}]*?)\s*{closing}"
    assert tightened(text, *pair) == re.sub(pattern, rf"{pair[0]}\1{pair[1]}", text)


def test_hostile_brackets_take_no_time():
    assert detokenized("(" * 10**6) == "(" * 10**6
    assert detokenized("( " * 10**5 + ")") == "(" + ("( " * (10**5 - 1)).rstrip() + ")"


def test_pages_begin_at_headings_of_the_first_level_only():
    first, second = articles(RAW)
    assert first.startswith(" = The Red Dog = \n \n The dog")
    assert first.endswith(" \n Tall ! \n ")
    assert second == " = A Second Page = \n \n One line : short . \n \n"
    assert articles("no heading = here\nat all\n") == ["no heading = here\nat all\n"]
    assert articles("before\n= A =\nb") == ["before", "= A =\nb"]
    assert articles(" \n\n = A = \n = B = ") == [" = A = ", " = B = "]
    assert articles(" = = A = = \nx") == [" = = A = = \nx"]
    assert articles("x\n = A=\n=B =") == ["x\n = A=\n=B ="]
    assert articles("= = = A = = =\n= =\n") == ["= = = A = = =\n= =\n"]


def test_rows_keep_their_newline_and_blank_ones_are_empty():
    assert rows(" \n a\x85b \n\nlast") == ["", " a\x85b \n", "", "last"]
    assert rows("") == []


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with WikiText-2")
def test_the_validation_part_of_wikitext_2_has_60_articles():
    assert SHARED is not None
    text = read_text(SHARED / "assets/data/wikitext2/valid.txt")
    pages = articles(text)
    assert len(pages) == 60  # its Wikipedia articles, as published
    assert pages[0].startswith(" = Homarus gammarus = ")
    assert "\n".join([" ", *pages]) == text
    assert len(rows(text)) == 3760


@pytest.mark.parametrize("window", [7, 16, 256])
def test_windows_of_a_long_text_add_up_to_every_window_by_hand(who, raw, window):
    found = values(build(who, raw, window=window).tasks[0], who)
    prefix = who.tokenizer.bos_token_id
    for page, value in zip(articles(RAW), found, strict=True):
        ids = [prefix, *who.tokenizer.encode(detokenized(page))]
        total, done = 0.0, 1  # the prefix is given
        while done < len(ids):
            end = min(done + window, len(ids))
            inputs = ids[max(0, end - 1 - window) : end]  # of which the last is only predicted
            if done == 1:
                inputs = ids[:end]
            given = len(inputs) - (end - done)
            total += log_probability(who.model, inputs[:given], inputs[given:])
            assert len(inputs) - 1 <= window
            assert done == 1 or window == 256 or len(inputs) - 1 == window
            done = end
        words, size = len(re.split(r"\s+", page)), len(page.encode())
        assert value["word_perplexity"] == (pytest.approx(total, rel=1e-6), words)
        assert value["byte_perplexity"] == value["bits_per_byte"] == (pytest.approx(total, rel=1e-6), size)


def test_without_a_token_to_begin_with_the_first_one_is_given(who, raw, monkeypatch):
    monkeypatch.setattr(who.tokenizer, "bos_token_id", None)
    monkeypatch.setattr(who.tokenizer, "eos_token_id", None)
    bare = replace(who)  # whose prefix was not looked up yet
    ids = bare.tokenizer.encode("The red dog ran.")
    first, second = rolling(bare, "The red dog ran.", window=len(ids) - 2)
    assert (first.context_ids, first.continuation_ids) == (tuple(ids[:1]), tuple(ids[1:-1]))
    assert (second.context_ids, second.continuation_ids) == (tuple(ids[1:-1]), tuple(ids[-1:]))
    with pytest.raises(DataError, match="the text 'a' is one token, and this tokenizer has none that could stand"):
        rolling(bare, "a")
    with pytest.raises(ConfigError, match="a text after nothing needs a beginning- or end-of-text token"):
        likelihood(bare, "", "The dog")


def test_the_score_divides_by_words_and_bytes_of_the_stored_text(who, tmp_path):
    page = " é ( a ) "
    (tmp_path / "one.txt").write_text(page)
    total = log_probability(who.model, who.prefix, who.tokenizer.encode(" é (a) "))
    found = scores(build(who, tmp_path / "one.txt"), who)
    assert found["word_perplexity"] == (pytest.approx(math.exp(-total / 6), rel=1e-5), None)  # "", é, (, a, ), ""
    assert found["byte_perplexity"] == (pytest.approx(math.exp(-total / 10), rel=1e-5), None)
    assert found["bits_per_byte"] == (pytest.approx(-total / 10 / math.log(2), rel=1e-5), None)


def test_documents_come_from_json_lines_too(who, raw, tmp_path):
    first, second = articles(RAW)
    lines = tmp_path / "pages.jsonl"
    lines.write_text("".join(json.dumps(it) + "\n" for it in ({"page": first}, {"text": " "}, {"text": second})))
    assert scores(build(who, lines), who) == scores(build(who, raw), who)
    assert read_documents(lines, max_chars=10) == [first[:10]]
    assert read_documents(lines, max_chars=len(first) + 3) == [first, " ", second[:2]]


def test_the_name_wikitext_is_the_protocol_harness_unless_another_one_is_named(who, raw):
    (task,) = build(who, raw).tasks
    assert (task.name, task.alias, task.version) == ("wikitext", "wikitext (harness)", 2)
    assert task.settings == {"data": str(raw), "protocol": "harness", "window": 256}
    assert build(who, raw, name="perplexity", protocol="harness").tasks[0].documents == task.documents
    (other,) = build(who, raw, protocol="windows", window=8, max_chars=99).tasks
    assert other.settings == {"data": str(raw), "protocol": "windows", "window": 8, "max_chars": 99}
    assert other.alias == "wikitext (windows)"
    assert task.target(task.documents[0]) is None
    assert task.prompt(task.documents[1], who)["input"] == " = A Second Page =\n\nOne line: short.\n\n"


def test_line_ends_and_a_byte_order_mark_change_nothing(who, raw, tmp_path):
    other = tmp_path / "windows.txt"
    other.write_bytes(b"\xef\xbb\xbf" + RAW.replace("\n", "\r\n").encode())
    assert read_text(other) == RAW
    assert read_text(other, max_chars=20) == RAW[:20]
    assert articles(read_text(other)) == articles(RAW)


def test_a_folder_stands_for_its_test_split_or_the_one_named(tmp_path):
    for name in ("wiki.test.raw", "valid.txt", "train.jsonl"):
        (tmp_path / name).write_text("x")
    assert text_file(tmp_path, None).name == "wiki.test.raw"
    assert text_file(tmp_path, "validation").name == "valid.txt"
    assert text_file(tmp_path, "train").name == "train.jsonl"
    (tmp_path / "wiki.test.raw").unlink()
    with pytest.raises(DataError, match=r"has no text of the split test; name a file, or put one of wiki\.test\.raw"):
        text_file(tmp_path, None)
    with pytest.raises(ConfigError, match="split 'train' is for a folder"):
        text_file(tmp_path / "valid.txt", "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"t\.txt: is empty; a perplexity needs text"),
        (b"\xef\xbb\xbf \r\n", "is empty; a perplexity needs text"),
        (b"a\nb\xff", r"t\.txt:2: is not UTF-8"),
        (b"\x1f\x8babc", "is compressed by gzip"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(tmp_path, content, message):
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_text(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"page": "a"}\n{"body": "b"}\n', r"d\.jsonl:2: has no text"),
        ('{"text": 3}\n', r"d\.jsonl:1: has no text"),
        ('{"text": "a"}\n{"text": \n', r"d\.jsonl:2: is not JSON"),
        ('{"text": " "}\n', r"d\.jsonl: is empty"),
        ("", r"d\.jsonl: is empty"),
    ],
)
def test_documents_that_cannot_be_read_are_refused(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_documents(path)


def test_a_cut_that_leaves_nothing_says_so(raw):
    with pytest.raises(DataError, match="has nothing in its first 2 characters"):
        read_text(raw, max_chars=2)
