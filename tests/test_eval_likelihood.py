"""Log-probabilities by definition, whatever the batch; windows that predict each token of a text once."""

from dataclasses import replace

import pytest
import torch

import models
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.likelihood import Likelihood, likelihood, rolling
from models import ConfigError, DataError, NonFiniteError
from tests import tiny, tiny_t5


@pytest.fixture(scope="module")
def examinee(tmp_path_factory):
    path = tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    model = models.load(path, dtype=torch.float32).eval()
    return Examinee(
        tokenizer=models.load_tokenizer(path), architecture="llama", max_tokens=256, loaded=model, identity="tiny"
    )


def by_hand(model, context, continuation):
    """Log-probability in float64 from the whole logits."""
    ids = torch.tensor([[*context, *continuation]])
    logits = model(ids)[0, len(context) - 1 : -1].double().log_softmax(-1)
    values = logits.gather(1, torch.tensor(continuation)[:, None])
    return values.sum().item(), logits.argmax(-1).tolist() == list(continuation)


TEXTS = [
    ("It is", " red"),
    ("It is", " blue"),
    ("It is", " red and blue, and much more of it"),
    ("", "It is red"),
    ("A longer context than the others have, by far", " and so"),
]


@pytest.mark.parametrize("batch_size", [1, 2, 5, "auto"])
def test_an_answer_is_the_log_probability_of_the_continuation(examinee, batch_size):
    requests = [likelihood(examinee, *texts) for texts in TEXTS]
    for request, answer in zip(requests, answer_all(examinee, requests, batch_size), strict=True):
        value, greedy = by_hand(examinee.model, request.context_ids, request.continuation_ids)
        assert answer[0] == pytest.approx(value, rel=1e-5)
        assert answer[1] == greedy


def test_logits_are_had_a_few_positions_at_a_time(examinee, monkeypatch):
    requests = [likelihood(examinee, *texts) for texts in TEXTS]
    whole = answer_all(examinee, requests)
    monkeypatch.setattr("eval.scoring.POSITIONS", 3)
    rows = []
    head = examinee.model.head
    monkeypatch.setattr(examinee.model, "head", lambda hidden: (rows.append(len(hidden)), head(hidden))[1])
    for part, answer in zip(answer_all(examinee, requests), whole, strict=True):
        assert part == [pytest.approx(answer[0], rel=1e-6), answer[1]]
    assert max(rows) == 3


def test_what_greedy_decoding_writes_is_greedy(examinee):
    context = examinee.tokenizer.encode("It is")
    rows = models.generate(examinee.model, torch.tensor([context]), max_new_tokens=4, eos_token_id=-1)
    new = rows[0, len(context) :].tolist()
    for ids, greedy in ((new, True), ([*new[:-1], (new[-1] + 1) % 50], False), ([(new[0] + 1) % 50, *new[1:]], False)):
        request = Likelihood(context_ids=tuple(context), continuation_ids=tuple(ids), context="", continuation="")
        assert answer_all(examinee, [request])[0][1] is greedy


def test_one_token_continuations_of_a_context_share_a_row(examinee, monkeypatch):
    shapes = []
    forward = examinee.model.model.forward
    monkeypatch.setattr(
        examinee.model.model,
        "forward",
        lambda ids, *rest, **more: (shapes.append(tuple(ids.shape)), forward(ids, *rest, **more))[1],
    )
    requests = [
        Likelihood(context_ids=(5, 6, 7), continuation_ids=(letter,), context="", continuation="")
        for letter in range(4)
    ]
    answers = answer_all(examinee, requests)
    assert shapes == [(1, 3)]
    for request, answer in zip(requests, answers, strict=True):
        assert answer[0] == pytest.approx(by_hand(examinee.model, (5, 6, 7), request.continuation_ids)[0], rel=1e-5)


def test_context_and_continuation_are_encoded_as_one_text(examinee):
    tokenizer = examinee.tokenizer
    for context, continuation in (("Answer:", " A"), ("It is ", "red"), ("colou", "r and")):
        before, after = examinee.pair(context, continuation)
        assert before + after == tokenizer.encode(context + continuation)
    assert examinee.pair("It is ", "red") == examinee.pair("It is", " red")
    assert examinee.pair("", "red") == ([tokenizer.bos_token_id], tokenizer.encode("red"))


def test_of_a_long_context_the_end_is_kept_or_the_start(examinee):
    short = replace(examinee, max_tokens=6)
    context = "one two three four five six seven eight"
    whole = tuple(examinee.pair(context, " nine")[0])
    after = examinee.pair(context, " nine")[1]
    end = likelihood(short, context, " nine")
    assert end.context_ids == whole[-(7 - len(after)) :]
    assert end.cut == len(whole) - len(end.context_ids) > 0
    assert end.length == 6
    start = likelihood(short, context, " nine", keep="start", room=2)
    assert start.context_ids == whole[:2]
    assert likelihood(examinee, context, " nine").cut == 0


def test_a_continuation_without_tokens_or_room_is_refused(examinee):
    with pytest.raises(DataError, match="no tokens of its own"):
        likelihood(examinee, "It is", "")
    with pytest.raises(DataError, match="takes 3 at once"):
        likelihood(replace(examinee, max_tokens=3), "It", " is one two three four five")


@pytest.mark.parametrize("length", [1, 5, 8, 9, 16, 17, 30])
def test_windows_predict_each_token_once_given_what_fits_before_it(examinee, length):
    """The harness's windows, worked out token by token: the first has the prefix, the last reaches back."""
    small = replace(examinee, max_tokens=8)
    text = ("It is red and small, round or blue. " * 3)[:length]
    ids = examinee.tokenizer.encode(text)
    windows = rolling(small, text)
    assert [id for window in windows for id in window.continuation_ids] == ids
    assert windows[0].context_ids == tuple(small.prefix)
    for window in windows:
        assert window.length <= 8
    begin = 0
    for window in windows[1:]:
        begin += 8
        end = min(begin + 8, len(ids))
        assert window.context_ids == tuple(ids[end - 9 : begin])
    total = sum(answer[0] for answer in answer_all(small, windows))
    assert total == pytest.approx(
        sum(by_hand(examinee.model, window.context_ids, window.continuation_ids)[0] for window in windows), rel=1e-5
    )


def test_a_model_that_gives_no_numbers_is_refused(examinee, monkeypatch):
    head = examinee.model.head
    monkeypatch.setattr(examinee.model, "head", lambda hidden: head(hidden) * torch.nan)
    with pytest.raises(NonFiniteError, match="no numbers"):
        answer_all(examinee, [likelihood(examinee, "It is", " red")])


def test_a_text_of_nothing_has_no_probability(examinee):
    with pytest.raises(DataError, match="empty"):
        rolling(examinee, "")


def test_a_t5_reads_the_context_and_writes_the_continuation():
    model = tiny_t5.t5()
    examinee = Examinee(tokenizer=models.load_tokenizer(tiny_t5.TOKENIZER), architecture="t5", loaded=model)
    requests = [
        Likelihood(context_ids=context, continuation_ids=after, context="", continuation="")
        for context, after in (((3, 4, 1), (5, 6)), ((7, 1), (8,)), ((7, 1), (9,)), ((3, 9, 11, 12, 1), (2, 3, 4)))
    ]
    for request, answer in zip(requests, answer_all(examinee, requests), strict=True):
        start = model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *request.continuation_ids[:-1]]])
        logits = model(torch.tensor([request.context_ids]), None, decoder)[0].double().log_softmax(-1)
        expected = logits.gather(1, torch.tensor(request.continuation_ids)[:, None]).sum().item()
        assert answer[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="causal"):
        rolling(examinee, "a text")
