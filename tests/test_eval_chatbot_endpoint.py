"""An endpoint is asked until it answers; what will not pass is said in its own words, and no reply is lost."""

import importlib.util
import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

import eval.chatbot.endpoint as module
from eval.chatbot.asking import Prompt, Reply
from eval.chatbot.endpoint import Endpoint, Fault, read_reply, retry_after
from models import ConfigError
from models.errors import ServiceError
from tests.chat_server import Answer, chat_server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", (0.01, 0.02))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(server, count=1, **given):
    how: dict[str, Any] = {"concurrency": 1, "timeout": 20.0} | given
    endpoint = Endpoint("org/tester", server if isinstance(server, str) else server.url, "secret", **how)
    prompts = {f"key {n}": Prompt("Be fair.", f"question {n}") for n in range(count)}
    return endpoint.replies(prompts)


def error(message, code=None):
    return {"error": {"message": message, "code": code, "type": "x", "param": None}}


def in_turn(*answers):
    """These answers, then a good one for ever."""
    return lambda request, number: answers[number] if number < len(answers) else Answer("fine")


def test_a_request_says_what_the_release_said_and_the_reply_is_kept_word_for_word():
    with chat_server(lambda request, number: Answer(" Both.\n\n3\n")) as server:
        [(key, reply)] = ask(server, temperature=0.2, max_tokens=77)
    [request] = server.requests
    assert request == {
        "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "question 0"}],
        "model": "org/tester",
        "temperature": 0.2,
        "max_tokens": 77,
        "path": "/v1/chat/completions",
    }
    assert server.headers[0]["authorization"] == "Bearer secret"
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    details = {"finish_reason": "stop", "served_by": "tester-1", "usage": usage}
    assert (key, reply) == ("key 0", Reply(" Both.\n\n3\n", details))


def test_a_model_that_has_another_name_for_the_limit_is_asked_by_that_name():
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

    def answer(request, number):
        return Answer(status=400, body=error(said)) if "max_tokens" in request else Answer("fine")

    with chat_server(answer) as server:
        assert len(list(ask(server, 3, max_tokens=77, retries=0))) == 3
    assert ["max_tokens" in request for request in server.requests] == [True, False, False, False]
    assert all(request["max_completion_tokens"] == 77 for request in server.requests[1:])


def test_a_server_that_knows_neither_name_is_not_asked_for_ever():
    said = "Neither max_tokens nor max_completion_tokens is known."
    with (
        chat_server(lambda request, number: Answer(status=400, body=error(said))) as server,
        pytest.raises(ConfigError, match="Neither"),
    ):
        list(ask(server))
    assert len(server.requests) == 2


def test_a_rate_limit_is_waited_out_as_long_as_the_server_says():
    with chat_server(in_turn(Answer(status=429, headers={"Retry-After": "0.4"}, body=error("slow down")))) as server:
        began = time.monotonic()
        assert len(list(ask(server, 2))) == 2
        assert time.monotonic() - began > 0.4
    assert server.prompts == ["question 0", "question 0", "question 1"]


def test_a_rate_limit_holds_all_requests_back():
    times = []

    def answer(request, number):
        times.append(time.monotonic())
        if number == 0:
            return Answer(status=429, headers={"Retry-After": "0.5"}, body=error("slow down"))
        time.sleep(0.05)
        return Answer("fine")

    with chat_server(answer) as server:
        assert len(list(ask(server, 8, concurrency=2))) == 8
    early = [it for it in times[2:] if it - times[0] < 0.4]
    assert len(early) == 0  # the second was on its way already


@pytest.mark.parametrize(
    "bad",
    [
        Answer(status=500, body=error("oops")),
        Answer(status=503, body=b"<html>no</html>", headers={"Content-Type": "text/html"}),
        Answer(status=408, body=error("late")),
        Answer(body=b'{"choices": [{"mess'),
        Answer(body=b""),
        Answer(body={"choices": []}),
        Answer(body=[]),
        Answer(body={"choices": [{"message": {"content": 3}}]}),
        Answer(body=error("upstream is down")),
    ],
)
def test_what_may_pass_is_tried_again(bad):
    with chat_server(in_turn(bad, bad)) as server:
        [(_, reply)] = ask(server)
    assert reply.text == "fine"
    assert len(server.requests) == 3


def test_a_request_that_is_not_answered_in_time_is_tried_again():
    free = threading.Event()

    def answer(request, number):
        if number == 0:
            free.wait(20)
        return Answer("fine")

    with chat_server(answer) as server:
        [(_, reply)] = ask(server, timeout=0.3)
        free.set()
    assert reply.text == "fine"
    assert len(server.requests) == 2


def test_tries_come_to_an_end():
    with (
        chat_server(lambda request, number: Answer(status=500, body=error("oops"))) as server,
        pytest.raises(ServiceError, match=r"answers 500: oops \(4 tries\); replies so far are kept") as refusal,
    ):
        list(ask(server, retries=3))
    assert len(server.requests) == 4
    assert refusal.value.exit_code == 8


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(ServiceError, match=rf"{url}/ cannot be reached"):
            list(ask(url, retries=1))


def test_a_wait_that_is_too_long_ends_the_run():
    answer = Answer(status=429, headers={"Retry-After": "86400"}, body=error("tomorrow"))
    with (
        chat_server(lambda request, number: answer) as server,
        pytest.raises(ServiceError, match=r"answers 429: tomorrow; it asks to wait 86400 s"),
    ):
        list(ask(server))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(status=401, body=error("Incorrect API key")), "answers 401: Incorrect API key"),
        (Answer(status=400, body=error("max_tokens is too large")), "answers 400: max_tokens is too large"),
        (Answer(status=404, body={"detail": "Not Found"}), r'404: \{"detail": "Not Found"\}; does --base-url end'),
        (Answer(status=422, body=b""), "answers 422: without a word"),
        (Answer(status=429, body=error("no money", "insufficient_quota")), "answers 429: no money"),
    ],
)
def test_what_will_not_pass_ends_the_run_with_the_servers_words(answer, message):
    with chat_server(lambda request, number: answer) as server, pytest.raises(ConfigError, match=message):
        list(ask(server, 5))
    assert len(server.requests) == 1


def test_replies_that_are_on_their_way_when_a_run_ends_are_taken():
    refused = threading.Event()

    def answer(request, number):
        if request["messages"][-1]["content"] == "question 1":
            refused.set()
            return Answer(status=401, body=error("no"))
        refused.wait(20)
        time.sleep(0.3)
        return Answer("fine")

    came = []
    with chat_server(answer) as server, pytest.raises(ConfigError, match="answers 401"):
        came.extend(key for key, _ in ask(server, 9, concurrency=3))
    assert sorted(came) == ["key 0", "key 2"]
    assert len(server.requests) == 3


def test_a_wait_for_another_try_ends_with_the_run(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF", (60.0, 60.0))

    def answer(request, number):
        if request["messages"][-1]["content"] == "question 0":
            return Answer(status=500, body=error("oops"))
        time.sleep(0.2)
        return Answer(status=401, body=error("no"))

    began = time.monotonic()
    with chat_server(answer) as server, pytest.raises(ConfigError, match="answers 401"):
        list(ask(server, 2, concurrency=2))
    assert time.monotonic() - began < 20


def test_as_many_requests_at_once_as_allowed():
    def answer(request, number):
        time.sleep(0.05)
        return Answer("fine")

    with chat_server(answer) as server:
        keys = [key for key, _ in ask(server, 12, concurrency=3)]
    assert sorted(keys) == sorted(f"key {n}" for n in range(12))
    assert server.most_at_once == 3


def test_a_reply_without_content_is_empty_and_what_is_unknown_is_left_out():
    assert read_reply(json.dumps({"choices": [{"message": {"content": None}}], "usage": None})) == Reply("")
    filtered = {
        "choices": [{"message": {"content": None}, "finish_reason": "content_filter"}],
        "usage": {"a": 1, "b": {}},
    }
    assert read_reply(json.dumps(filtered)).details == {"finish_reason": "content_filter", "usage": {"a": 1}}
    with pytest.raises(Fault, match=r"not JSON: '\{'"):
        read_reply("{")


def test_waits_are_numbers_or_dates():
    assert retry_after({}) is None
    assert retry_after({"retry-after": "12.5"}) == 12.5
    assert retry_after({"retry-after": "-3"}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    later = datetime.now(UTC) + timedelta(seconds=100)
    wait = retry_after({"retry-after": format_datetime(later, usegmt=True)})
    assert wait is not None
    assert 95 < wait <= 100
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package openai .* pip install openai"):
        list(ask("http://127.0.0.1:9/v1"))
    assert list(Endpoint("m").replies({})) == []  # where nothing is asked, nothing is needed
