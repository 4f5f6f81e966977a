"""The report on probes: what it marks, that texts stay texts in a browser, and how it is filtered without a script."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from eval.lemons.checks import Checks
from eval.lemons.family import row
from eval.lemons.page import Sheet, as_html, marked
from eval.lemons.report import main, read_sheet
from models.errors import DataError
from tests.browser import chromium

HOSTILE = (
    "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\"></style></div></main>"
    "<svg onload='document.title=1'>&amp;\n\u202eright to left\u202c " + "x" * 3000
)


def answered(
    category: str, id: str, answer: str, says: str = "red", asked: str = "Which colour?", note: str = ""
) -> Any:
    document = {
        "id": id,
        "category": category,
        "messages": [{"role": "user", "content": asked}],
        "note": note,
        "checks": {"says": [says], "avoids": [], "number": None, "secret": None, "complies": False},
    }
    return row(document, answer)


def sheets() -> list[Sheet]:
    one = [answered("colours", "a", "It is red."), answered("colours", "b", "Blue."), answered("sizes", "c", "red")]
    two = [answered("colours", "a", "It is blue."), answered("colours", "b", "Green."), answered("sizes", "c", "Red!")]
    return [Sheet("one", one), Sheet("two", two)]


def left(folder: Path, sheet: Sheet) -> Path:
    folder.mkdir(parents=True)
    (folder / "lemons.jsonl").write_text("".join(json.dumps(it) + "\n" for it in sheet.rows))
    return folder


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def shown(browser, tmp_path):
    """A page of sheets in a browser, with what its console says."""
    contexts = []

    def show(given: list[Sheet]) -> tuple[Any, list[str]]:
        path, said = tmp_path / "report.html", []
        path.write_text(as_html(given), encoding="utf-8")
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.goto(path.as_uri())
        return page, said

    yield show
    for context in contexts:
        context.close()


def visible(page: Any) -> list[str]:
    return page.eval_on_selector_all(
        "article h3", "all => all.filter(it => it.checkVisibility()).map(it => it.innerText)"
    )


# What it says


def test_it_counts_what_passed_by_category_and_system():
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', as_html(sheets()))
    cells = {name: re.findall("<td>(.*?)</td>", rest) for name, rest in rows}
    assert cells == {
        "Colours": ["1 of 2", "0 of 2"],
        "Sizes": ["1 of 1", "1 of 1"],
        "all": ["2 of 3", "1 of 3"],
    }


def test_it_marks_what_decided():
    html = as_html(sheets()[:1])
    assert "It is <mark>red</mark>." in html
    assert html.count("✓ passed") == 2
    assert html.count("✗ failed") == 1
    assert '<li class="fail"><span class="check">✗</span> says /red/</li>' in html


def test_in_a_failed_answer_only_what_failed_is_marked():
    document = {
        "id": "a",
        "category": "c",
        "messages": [{"role": "user", "content": "?"}],
        "note": "",
        "checks": vars(Checks(says=("red",), avoids=("blue",))),
    }
    assert "red and <mark>blue</mark>" in as_html([Sheet("one", [row(document, "red and blue")])])


def test_marks_that_overlap_leave_the_text_whole():
    assert marked("abcdef", [(3, 5), (0, 4)]) == "<mark>abcd</mark>ef"
    assert marked("abcdef", [(4, 6), (0, 2)]) == "<mark>ab</mark>cd<mark>ef</mark>"


def test_an_answer_that_is_missing_or_empty_is_said():
    one, two = sheets()
    html = as_html([one, Sheet("two", two.rows[:2])])
    assert html.count("not asked") == 1
    assert "(nothing)" in as_html([Sheet("one", [answered("colours", "a", " \n")])])


def test_systems_that_were_asked_different_things_are_not_compared():
    other = Sheet("two", [answered("colours", "a", "red", asked="Which one?")])
    with pytest.raises(DataError, match="colours, a: the systems were asked different things"):
        as_html([sheets()[0], other])


def test_every_text_is_escaped():
    hostile = answered("colours", HOSTILE, HOSTILE, HOSTILE[:20], HOSTILE, HOSTILE)
    html = as_html([Sheet(HOSTILE, [hostile])])
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("</style>") == html.count("</main>") == 1
    assert unescape(html).count(HOSTILE) == 5 + 1  # name (twice), id, question and note; of the answer a part is marked


# In a browser


def test_hostile_texts_do_not_run(shown):
    hostile = answered("colours", HOSTILE, HOSTILE, "x+", HOSTILE, HOSTILE)
    page, said = shown([Sheet(HOSTILE, [hostile]), Sheet("two", [answered("colours", "a", "red")])])
    assert page.title() == "Lemons"
    assert page.eval_on_selector_all("script, img, svg, iframe, link", "all => all.length") == 0
    assert page.inner_text(".answer .text") == HOSTILE
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert said == []


def test_a_script_in_the_page_would_not_run(shown, tmp_path):
    page, _ = shown(sheets())
    path = tmp_path / "report.html"
    html = path.read_text()
    path.write_text(html.replace("<main>", f"<main>{HOSTILE}"))
    page.reload()
    assert page.title() == "Lemons"
    policy = re.compile("<meta http-equiv[^>]*>")
    path.write_text(policy.sub("", html).replace("<main>", f"<main>{HOSTILE}"))
    page.reload()
    assert page.title() != "Lemons"  # without its policy it would


def test_it_is_filtered_by_category_and_by_outcome_without_a_script(shown):
    page, _ = shown(sheets())
    assert visible(page) == ["a", "b", "c"]
    page.click("label[for=category-2]")
    assert visible(page) == ["c"]
    page.click("label[for=category-0]")
    page.click("label[for=shown-1]")
    assert visible(page) == ["a", "b"]
    assert not page.is_visible("h2:text('Sizes')")
    page.click("label[for=shown-2]")
    assert visible(page) == ["a"]
    page.focus("#shown-2")
    page.keyboard.press("ArrowLeft")
    assert visible(page) == ["a", "b"]


def test_it_prints_whole(shown):
    page, _ = shown([Sheet("one", [answered("colours", "a", "red\n" * 300)])])
    assert page.eval_on_selector(".answer .text", "it => it.scrollHeight > it.clientHeight")
    page.emulate_media(media="print")
    assert page.eval_on_selector(".answer .text", "it => it.scrollHeight <= it.clientHeight")
    assert not page.is_visible("nav")


# The command


def test_a_report_of_several_systems(tmp_path, capsys):
    one, two = sheets()
    left(tmp_path / "evals" / "first", one)
    left(tmp_path / "runs" / "second" / "eval", two)
    out = tmp_path / "pages" / "report.html"
    assert main([str(tmp_path / "evals" / "first"), str(tmp_path / "runs" / "second"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text() == as_html([Sheet("first", one.rows), Sheet("second", two.rows)])
    named = [f"a=b={tmp_path / 'evals' / 'first' / 'lemons.jsonl'}", str(tmp_path / "evals" / "first")]
    assert [read_sheet(it).system for it in named] == ["a=b", "first"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "answer is 3; is this a file that"),
        ({"messages": ["Hello"]}, "a message lacks its role"),
        ({"messages": [{"role": "user"}]}, "a message lacks its role"),
        ({"checks": [3]}, "a check is not as it should be"),
        ({"checks": [{"check": "x", "passed": True, "found": [0, 99]}]}, "a check has found"),
        ({"checks": [{"check": "x", "passed": True, "found": [True, 2]}]}, "a check has found"),
        ({"id": "a"}, "the probe a comes twice"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(tmp_path, change, message, capsys):
    rows = [answered("colours", "a", "red"), {**answered("colours", "b", "red"), **change}]
    folder = left(tmp_path / "a", Sheet("a", rows))
    assert main([str(folder), "--out", str(tmp_path / "out.html")]) == 3
    said = capsys.readouterr().err
    assert "lemons.jsonl:2: " in said
    assert message in said
    assert not (tmp_path / "out.html").exists()


def test_mistakes_have_their_message_and_exit_code(tmp_path, capsys):
    one = left(tmp_path / "a", sheets()[0])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl").write_text('{"id": "a"')
    (tmp_path / "file").write_text("")
    for arguments, code, message in (
        ([one, one], 2, "two systems have the same name among a, a"),
        ([tmp_path], 3, "neither a file of answers nor a directory with lemons.jsonl"),
        ([tmp_path / "empty.jsonl"], 3, "has no answers"),
        ([tmp_path / "cut.jsonl"], 3, "cut.jsonl:1: is not JSON"),
    ):
        assert main([*map(str, arguments), "--out", str(tmp_path / "out.html")]) == code
        assert message in capsys.readouterr().err
    assert main([str(one), "--out", str(tmp_path / "file" / "out.html")]) == 7
    assert "cannot be written" in capsys.readouterr().err
