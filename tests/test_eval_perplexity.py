"""Perplexity by definition, the same in any batching, and the held-out loss over the same labels as training."""

import json
import math
from dataclasses import replace

import pytest
import torch

import models
from eval import perplexity
from eval.held_out import held_out_loss
from eval.perplexity import FAMILY
from eval.scoring import token_losses
from eval.task import Spec
from models import ConfigError, DataError
from tests import tiny
from tests.examining import examinee, log_probability, scores
from tests.golden import DATA, GOLDEN


@pytest.fixture(scope="module")
def model():
    return models.load(GOLDEN / "llama-gqa", dtype=torch.float32)


def test_each_token_is_scored_by_the_logits_before_it(model, monkeypatch):
    ids = torch.randint(0, 128, (3, 10))
    expected = -model(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_losses(model, ids), expected)
    monkeypatch.setattr("kernels.chunked.CHUNK_BYTES", {"cpu": 1})  # 16 positions at a time
    torch.testing.assert_close(token_losses(model, ids), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_windows_do_not_overlap_and_their_first_token_is_not_scored(model, batch_size):
    ids = torch.randint(0, 128, (45,)).tolist()
    result = perplexity(model, ids, window=10, batch_size=batch_size)
    windows = [ids[i : i + 10] for i in (0, 10, 20, 30)]
    total = sum(token_losses(model, torch.tensor([w])).sum().item() for w in windows)
    assert result.perplexity == pytest.approx(math.exp(total / 36), rel=1e-5)
    assert (result.tokens, result.windows, result.window, result.protocol) == (36, 4, 10, "windows")
    assert perplexity(model, ids, window=10, limit=2).windows == 2


def test_a_text_shorter_than_a_window_is_one_window(model):
    assert perplexity(model, list(range(7)), window=100).tokens == 6


def test_a_trained_model_finds_its_own_story_likely():
    model = models.load(DATA / "stories260K", dtype=torch.float32)
    ids = models.generate(model, torch.tensor([[1]]), max_new_tokens=100, eos_token_id=-1)[0].tolist()
    shuffled = [ids[i] for i in torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, ids).perplexity < 3 < 50 < perplexity(model, shuffled).perplexity


def test_the_held_out_loss_weighs_every_label_alike(model):
    ids = torch.randint(0, 128, (4, 9))
    labels = ids.clone()
    labels[0, :7] = -100
    labels[3] = -100
    whole = {"input_ids": ids, "labels": labels}
    rows = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(4)]
    model.train()
    assert held_out_loss(model, rows).loss == pytest.approx(model.loss(**whole).item(), rel=1e-5)
    assert held_out_loss(model, rows).tokens == 2 + 8 + 8
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        ([1, 2, 3], {"window": 1}, "window is 1"),
        ([1, 2, 3], {"limit": 0}, "limit is 0"),
        ([1], {}, r"the text has 1 token\(s\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, **kwargs)


TEXT = "The red dog ran.\n \nIt was small, and the cat was large.\n" * 12


@pytest.fixture(scope="module")
def who(tmp_path_factory):
    return examinee(tiny.checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def build(who, data, name="perplexity", **options):
    return FAMILY.build(Spec(name=name, examinee=who, data=data, **options))


@pytest.mark.parametrize(("window", "limit"), [(16, None), (50, 3), (256, None)])
def test_the_task_gives_the_number_of_the_function(who, text, window, limit):
    ids = who.tokenizer.encode(TEXT)
    expected = perplexity(who.model, ids, window, limit)
    suite = build(who, text, window=window)
    value, stderr = scores(suite, who, limit=limit)["token_perplexity"]
    assert value == pytest.approx(expected.perplexity, rel=1e-6)
    assert stderr == (None if expected.stderr is None else pytest.approx(expected.stderr, rel=1e-4))
    assert len(suite.tasks[0].documents) == len(ids) // window or limit
    assert suite.tasks[0].settings == {"data": str(text), "protocol": "windows", "window": window}
    assert scores(suite, who, limit=limit, batch_size=1)["token_perplexity"][0] == pytest.approx(value, rel=1e-6)


def test_a_short_text_is_a_window_of_the_task_too(who, tmp_path):
    (tmp_path / "short.txt").write_text("The red dog ran.")
    ids = who.tokenizer.encode("The red dog ran.")
    suite = build(who, tmp_path / "short.txt", window=200)
    assert scores(suite, who)["token_perplexity"] == (pytest.approx(perplexity(who.model, ids).perplexity), None)
    assert suite.tasks[0].settings["window"] == len(ids)


def test_documents_are_joined_by_blank_lines(who, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": part}) + "\n" for part in ("The red dog ran.", "It was small.")))
    (tmp_path / "joined.txt").write_text("The red dog ran.\n\nIt was small.")
    found = [scores(build(who, tmp_path / name, window=8), who) for name in ("documents.jsonl", "joined.txt")]
    assert found[0] == found[1]


def test_a_file_that_is_no_text_of_documents_is_scored_as_it_stands(who, tmp_path):
    records = tiny.records(tmp_path / "records.jsonl")
    expected = perplexity(who.model, who.tokenizer.encode(records.read_text()), 64)
    assert scores(build(who, records, window=64), who)["token_perplexity"][0] == pytest.approx(expected.perplexity)


def test_gptq_joins_rows_by_blank_lines_and_leaves_the_rest_out(who, text, tmp_path):
    ids = who.tokenizer.encode(("The red dog ran.\n\n\n\n\nIt was small, and the cat was large.\n\n\n" * 12)[:-2])
    windows = [ids[begin : begin + 40] for begin in range(0, len(ids) - 39, 40)]
    losses = [-log_probability(who.model, window[:1], window[1:]) for window in windows]
    suite = build(who, text, protocol="gptq", window=40)
    value, stderr = scores(suite, who)["token_perplexity"]
    assert len(ids) % 40
    assert value == pytest.approx(math.exp(sum(losses) / (39 * len(windows))), rel=1e-5)
    deviation = torch.tensor(losses).double().div(39).std().item()
    assert stderr == pytest.approx(value * deviation / math.sqrt(len(windows)), rel=1e-3)
    documents = tmp_path / "rows.jsonl"
    rows = [{"text": row} for row in ("The red dog ran.\n", "", "It was small, and the cat was large.\n") * 12]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scores(build(who, documents, protocol="gptq", window=40), who)["token_perplexity"] == (value, stderr)


def test_gptq_begins_with_the_beginning_of_text_where_the_tokenizer_puts_one(who, text, monkeypatch):
    plain = all_ids(build(who, text, protocol="gptq", window=8), who)
    monkeypatch.setattr(type(who.tokenizer), "adds_bos", True)
    begun = all_ids(build(who, text, protocol="gptq", window=8), who)
    assert begun[0] == who.tokenizer.bos_token_id
    assert begun[1 : len(plain)] == plain[: len(plain) - 1]
    windows = all_ids(build(who, text, window=8), who)
    assert windows == who.tokenizer.encode(TEXT)[: len(windows)]


def all_ids(suite, who):
    """The ids of all windows of a task, one after the other."""
    requests = [request for document in suite.tasks[0].documents for request in suite.tasks[0].requests(document, who)]
    return [id for request in requests for id in (*request.context_ids, *request.continuation_ids)]


def test_a_window_shows_its_text(who, text):
    (task,) = build(who, text, window=16).tasks
    second = task.documents[1]
    assert (second["begin"], second["end"]) == (16, 32)
    assert TEXT.startswith("".join(document["text"] for document in task.documents))
    assert task.prompt(second, who) == {"task": "perplexity", "input": second["text"], "output": None}
    assert task.target(second) is None
    assert task.requests(second, who)[0].arguments == ("", second["text"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 300}, ConfigError, "window is 300, but the model takes 256 tokens at once"),
        ({}, ConfigError, "window is 512, but the model takes 256"),
        ({"protocol": "gptq"}, ConfigError, "window is 2048, but the model takes 256"),
        ({"protocol": "harness", "window": 257}, ConfigError, "window is 257"),
        ({"window": 1}, ConfigError, "window is 1; at least 2"),
        ({"window": 0}, ConfigError, "window is 0; at least 2"),
        ({"protocol": "gptq", "window": 256, "max_chars": 60}, DataError, r"tokens, and the protocol gptq takes whole"),
        ({"max_chars": 1}, DataError, r"the text has 1 token\(s\)"),
        ({"split": "test"}, ConfigError, "split 'test' is for a folder"),
        ({"data": None}, ConfigError, "perplexity needs data: a UTF-8 text file"),
    ],
)
def test_what_a_protocol_cannot_do_is_refused(who, text, options, error, message):
    with pytest.raises(error, match=message):
        build(who, **{"data": text, **options})


@pytest.mark.parametrize("architecture", ["t5", "roberta"])
def test_only_causal_models_have_a_perplexity(who, text, architecture):
    other = replace(who, architecture=architecture)
    for protocol in FAMILY.protocols:
        with pytest.raises(ConfigError, match=f"needs a causal language model .LLaMA.*one is {architecture.upper()}"):
            build(other, text, protocol=protocol)
