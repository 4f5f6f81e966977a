"""The raters' page in a real browser: votes by mouse and keyboard, hostile texts, other pages, and what can be read."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests import annotating
from tests.annotating import QUESTIONS, SYSTEMS, Served, Serving
from tests.browser import chromium

HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    "<svg onload='window.ran = 3'></svg><b>bold</b> &amp; `code` **stars**\n\n"
    "  indented\tand tabbed\r\n\u202eright to left\u202c \u0645\u0631\u062d\u0628\u0627 \U0001f34b\u0000\n"
    "</div></section><style>* { display: none }</style>" + "x" * 5000
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


class Page:
    """A rater at a browser; what the console and the network say is kept."""

    def __init__(self, browser: Any, address: str, name: str | None = "Ada", **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        if name is not None:
            self.page.fill("#name", name)
            self.page.keyboard.press("Enter")
            self.page.wait_for_selector("#rating, #finished")

    def state(self) -> tuple[str, str, str, str]:
        """Progress, question and answers, as they are seen."""
        return tuple(self.page.text_content(id) for id in ("#count", "#question", "#a", "#b"))

    def until(self, count: str) -> None:
        self.page.wait_for_function("count => document.getElementById('count').textContent === count", arg=count)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)


@pytest.fixture
def at(browser) -> Iterator[Any]:
    """Pages that are closed at the end, when nothing may have gone wrong in them."""
    pages = []

    def opened(address: str, *arguments: Any, **context: Any) -> Page:
        pages.append(Page(browser, address, *arguments, **context))
        return pages[-1]

    yield opened
    for page in pages:
        page.context.close()


@pytest.fixture
def serving(tmp_path):
    serving = Serving(annotating.desk(annotating.files(tmp_path / "files")))
    yield serving
    serving.close()


def scores(serving: Serving) -> list[int]:
    return [vote.score for vote in serving.desk.votes.all()]


def test_votes_by_mouse_and_by_every_key(serving, at):
    ada = at(serving.address)
    ada.until("1 of 12")
    acts = (
        (lambda: ada.page.click("text=A is better"), 1),
        (lambda: ada.page.click("text=B is better"), 2),
        (lambda: ada.page.click("#choices >> text=Tie"), 3),
        (lambda: ada.press("a"), 1),
        (lambda: ada.press("B"), 2),
        (lambda: ada.press("t"), 3),
        (lambda: ada.press("1"), 1),
        (lambda: ada.press("2"), 2),
        (lambda: ada.press("3"), 3),
        (lambda: ada.press("ArrowLeft", "Enter"), 1),
        (lambda: ada.press("ArrowRight", "ArrowLeft", "Space"), 3),
    )
    for done, (act, score) in enumerate(acts, 1):
        act()
        ada.until(f"{done + 1} of 12")
        assert scores(serving)[-1] == score
        assert len(scores(serving)) == done
    ada.press("b")
    ada.page.wait_for_selector("#finished")
    assert ada.page.text_content("#tally") == "You rated 12 comparisons."
    assert len(scores(serving)) == 12
    assert ada.said == []


def test_keys_with_ctrl_and_keys_held_down_do_not_vote(serving, at):
    ada = at(serving.address)
    ada.until("1 of 12")
    ada.press("Control+a", "Alt+b", "Meta+t")
    held = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', repeat: true, bubbles: true}))"
    ada.page.evaluate(f"const body = document.body; body.{held.removeprefix('document.')}")
    ada.press("t")
    ada.until("2 of 12")
    assert scores(serving) == [3]


def test_letters_typed_into_the_name_do_not_vote(serving, at):
    bob = at(serving.address, None)
    bob.page.type("#name", "bat 123 u")
    bob.press("Enter")
    bob.until("1 of 12")
    assert bob.page.input_value("#name") == "bat 123 u"
    assert scores(serving) == []


def test_undo_by_key_and_by_mouse_shows_the_same_again(serving, at):
    ada = at(serving.address)
    ada.until("1 of 12")
    first = ada.state()
    assert not ada.page.is_visible("#rating .undo")
    ada.press("a")
    ada.until("2 of 12")
    second = ada.state()
    ada.press("b")
    ada.until("3 of 12")
    ada.press("u")
    ada.until("2 of 12")
    assert ada.state() == second
    ada.page.click("#rating .undo")
    ada.until("1 of 12")
    assert ada.state() == first
    assert scores(serving) == []


def test_the_last_vote_can_be_undone_as_well(serving, at):
    serving.desk.by_key = dict(list(serving.desk.by_key.items())[:1])
    ada = at(serving.address)
    ada.until("1 of 1")
    ada.press("a")
    ada.page.wait_for_selector("#finished")
    ada.page.click("#finished .undo")
    ada.until("1 of 1")
    assert scores(serving) == []


def test_a_rater_goes_on_after_a_reload_and_another_begins_anew(serving, at):
    ada = at(serving.address)
    ada.until("1 of 12")
    ada.press("a")
    ada.until("2 of 12")
    before = ada.state()
    ada.page.reload()
    ada.until("2 of 12")
    assert ada.state() == before
    bob = at(serving.address, "Bob")
    bob.until("1 of 12")
    bob.press("t")
    bob.until("2 of 12")
    assert {(vote.rater, vote.score) for vote in serving.desk.votes.all()} == {("ada", 1), ("bob", 3)}
    ada.page.click("#rating .leave")
    assert ada.page.evaluate("document.activeElement.id") == "name"
    ada.page.reload()
    assert ada.page.is_visible("#welcome")


def test_a_vote_survives_a_server_that_is_killed_and_comes_back(tmp_path, at):
    paths = annotating.files(tmp_path / "files")
    served = Served(paths)
    ada = at(served.address)
    ada.until("1 of 12")
    ada.press("a")
    ada.until("2 of 12")
    served.kill()
    ada.press("b")  # nobody is there
    ada.page.wait_for_selector("text=The server does not answer")
    again = Serving(annotating.desk(paths), served.port)
    ada.until("3 of 12")
    assert scores(again) == [1, 2]
    again.close()


@pytest.fixture
def hostile(tmp_path):
    paths = annotating.files(tmp_path / "files", SYSTEMS[:2], {SYSTEMS[0]: HOSTILE})
    questions = [{"question_id": n, "text": HOSTILE + text} for n, text in enumerate(QUESTIONS, 1)]
    annotating.write(paths[0], questions)
    serving = Serving(annotating.desk(paths))
    yield serving
    serving.close()


def test_hostile_texts_are_shown_as_text_and_not_run(hostile, at):
    ada = at(hostile.address, "<img src=x onerror='window.ran = 4'>")
    ada.until("1 of 4")
    _, question, a, b = ada.state()
    assert HOSTILE in (a, b)
    assert question.startswith(HOSTILE)
    assert ada.page.evaluate("window.ran") is None
    assert (
        ada.page.eval_on_selector_all("#rating img, #rating script, #rating svg, #rating style", "all => all.length")
        == 0
    )
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert ada.page.evaluate(wide) == 0
    for side in ("a", "b", "question"):  # long words are broken
        assert ada.page.eval_on_selector(f"#{side}", "it => it.scrollWidth <= it.clientWidth")
    assert ada.page.is_visible("#choices")
    ada.press("a")
    ada.until("2 of 4")
    assert ada.said == []


def test_even_a_text_that_became_html_would_not_run(hostile, at):
    ada = at(hostile.address)
    ada.until("1 of 4")
    tried = ada.page.evaluate(
        """() => {
            try { document.getElementById("a").innerHTML = "<img src=x onerror='window.ran = 1'>"; }
            catch (error) { return error.name; }
            return "put in";
        }"""
    )
    assert tried == "TypeError"  # trusted types
    assert ada.page.evaluate("window.ran") is None


@pytest.mark.parametrize("guarded", [True, False])
def test_even_a_text_within_the_page_itself_would_not_run(hostile, at, guarded):
    ada = at(hostile.address, None)

    def put_in(route: Any) -> None:
        response = route.fetch()
        headers = response.headers if guarded else {"content-type": "text/html"}
        body = response.text().replace("<noscript>", f"{HOSTILE}<noscript>")
        route.fulfill(status=200, headers=headers, body=body)

    ada.page.route(hostile.address, put_in)
    ada.page.reload()
    ada.page.wait_for_selector("svg", state="attached")
    assert (ada.page.evaluate("window.ran") is None) == guarded


def test_nothing_is_fetched_from_elsewhere_and_no_system_is_named(serving, at):
    ada = at(serving.address)
    ada.until("1 of 12")
    ada.press("a")
    ada.until("2 of 12")
    assert all(url.startswith(serving.address) for url in ada.asked)
    html = ada.page.content() + json.dumps(ada.page.evaluate("({...localStorage, ...sessionStorage})"))
    assert not any(system in html + "".join(ada.asked) for system in SYSTEMS)


def test_a_vote_from_another_page_is_refused(serving, tmp_path, at):
    """A page of another origin in the same browser posts as the rater would, in the ways that a page has."""
    other = Serving(annotating.desk(annotating.files(tmp_path / "other")))
    ada = at(serving.address)
    ada.until("1 of 12")
    item, token = serving.desk.next("ada")["item"], serving.server.page_token
    stranger = ada.context.new_page()
    stranger.route(
        "**/evil.html", lambda route: route.fulfill(status=200, content_type="text/html", body="<body></body>")
    )
    stranger.goto(f"http://localhost:{other.server.server_port}/evil.html")
    body = json.dumps({"rater": "Ada", "item": item, "score": 1})
    for headers in ({"Content-Type": "application/json", "X-Token": token}, {"Content-Type": "text/plain"}):
        outcome = stranger.evaluate(
            "([url, body, headers]) => fetch(url, {method: 'POST', body, headers}).then(r => r.status, e => e.name)",
            [f"{serving.address}vote", body, headers],
        )
        assert outcome == "TypeError"  # the browser lets it see nothing
    sent = stranger.evaluate(
        "([url, body]) => fetch(url, {method: 'POST', body, mode: 'no-cors'}).then(r => r.type, e => e.name)",
        [f"{serving.address}vote", body],
    )
    assert sent in ("opaque", "TypeError")
    assert scores(serving) == []
    other.close()


def test_a_dialogue_is_shown_turn_by_turn(tmp_path, at):
    paths = annotating.files(tmp_path / "files", SYSTEMS[:2])
    dialogue = "### Human: Name a fruit. ### Assistant: A lemon. ### Human: Another one? ### Assistant:"
    annotating.write(paths[0], [{"question_id": 1, "text": dialogue}])
    serving = Serving(annotating.desk(paths))
    ada = at(serving.address)
    ada.until("1 of 1")
    assert ada.page.eval_on_selector_all(".turn", "all => all.map(turn => turn.innerText)") == [
        "Human\nName a fruit.",
        "Assistant\nA lemon.",
        "Human\nAnother one?",
    ]
    serving.close()


@pytest.fixture
def long(tmp_path):
    """Answers that are longer than the window."""
    texts: dict[str, str] = dict.fromkeys(SYSTEMS, "A line of an answer.\n" * 200)
    serving = Serving(annotating.desk(annotating.files(tmp_path / "files", SYSTEMS, texts)))
    yield serving
    serving.close()


def contrast(one: str, other: str) -> float:
    """The ratio that WCAG defines, of two colours as a browser gives them."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_everything_can_be_read_and_reached(long, at, scheme, width):
    ada = at(long.address, viewport={"width": width, "height": 740}, color_scheme=scheme)
    ada.until("1 of 12")
    ada.press("a")
    ada.until("2 of 12")
    grounds = {"#asked": "html", "header": "html", ".text": ".answer", ".answer h2": ".answer", ".plain": "html"}
    grounds |= {"#choices button": "#choices button", "#choices [data-score='2']": "#choices button"}
    for ink, ground in grounds.items():
        colour = ada.page.eval_on_selector(ink, "it => getComputedStyle(it).color")
        behind = ada.page.eval_on_selector(ground, "it => getComputedStyle(it).backgroundColor")
        assert contrast(colour, behind) >= 4.5, (ink, colour, behind)
    for button in ada.page.query_selector_all("#choices button"):
        box = button.bounding_box()
        assert box["y"] + box["height"] <= 740  # in sight without scrolling
        assert box["height"] >= 44
    assert ada.page.evaluate("document.documentElement.scrollWidth") <= width
    assert ada.page.get_attribute("#note", "aria-live") == "polite"
    assert ada.page.text_content("#note") == "Comparison 2 of 12."
    assert ada.page.evaluate("document.activeElement.id") == "question-title"
    reached = []
    for _ in range(6):  # from the question on: both answers, three choices, undo
        ada.press("Tab")
        reached.append(ada.page.evaluate("document.activeElement.id || document.activeElement.innerText.trim()"))
        assert ada.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached[:2] == ["a", "b"]
    assert [word.split()[-1] for word in reached[2:]][0::2] == ["better", "better"]
    roles = ada.page.evaluate(
        "[...document.querySelectorAll('#rating [role=region], #rating [role=group]')].map(it => it.role)"
    )
    assert sorted(roles) == ["group", "region", "region"]
