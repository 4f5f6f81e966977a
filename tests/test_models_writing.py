"""`qlora generate` and `qlora chat`: what is asked of each kind of model, and what of it is text."""

import io

import pytest
import torch
from rich.console import Console

import models
from eval.generate import GenerateOptions, SamplingOptions
from eval.generate import command as generate_command
from models.target import LoadOptions
from models.writing import ChatOptions, answer, chat_command
from tests import tiny, tiny_t5

LOAD = LoadOptions(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_t5.checkpoint(tmp_path_factory.mktemp("t5") / "model", **tiny_t5.V1_1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("llama") / "model")


def said(path, **options):
    screen = io.StringIO()
    console = Console(file=screen, width=1000)
    options = GenerateOptions(target=str(path), prompt="The cat sat.", max_new_tokens=12, load=LOAD, **options)
    result = generate_command(options, console)
    assert screen.getvalue() == result["text"] + "\n"
    return result["text"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_t5_reads_the_prompt_to_its_end_and_its_decoders_text_is_shown(t5, num_beams):
    model, tokenizer = models.load(t5, dtype=torch.float32), models.load_tokenizer(t5)
    ids = torch.tensor([tokenizer.encode("The cat sat.", eos=True)])
    written = models.generate(model, ids, max_new_tokens=12, num_beams=num_beams)[0, 1:].tolist()
    text = said(t5, num_beams=num_beams)
    assert text == tokenizer.decode(written)
    assert text


@pytest.mark.parametrize("length_penalty", [1.0, -1.0])
def test_a_llamas_best_beam_is_shown_after_the_prompt(llama, length_penalty):
    model, tokenizer = models.load(llama, dtype=torch.float32), models.load_tokenizer(llama)
    ids = torch.tensor([tokenizer.encode("The cat sat.", bos=tokenizer.adds_bos)])
    rows = models.generate(model, ids, max_new_tokens=12, num_beams=3, length_penalty=length_penalty)
    text = said(llama, num_beams=3, length_penalty=length_penalty)
    assert text == tokenizer.decode(rows[0, ids.shape[1] :].tolist())
    assert text


def test_pieces_of_a_streamed_text_are_the_text(t5):
    model, tokenizer = models.load(t5, dtype=torch.float32), models.load_tokenizer(t5)
    ids = tokenizer.encode("The cat sat.", eos=True)
    written = models.generate(model, torch.tensor([ids]), max_new_tokens=12)[0, 1:].tolist()
    parts = list(answer(model, tokenizer, ids, 12))
    assert len(parts) > 2
    assert "".join(parts) == tokenizer.decode(written)


def test_a_chat_with_a_t5_is_refused(t5):
    with pytest.raises(models.ConfigError, match=r"chat needs a causal language model .* this one is T5"):
        said(t5, chat=True)
    with pytest.raises(models.ConfigError, match=r"chat needs a causal language model .* this one is T5"):
        chat_command(ChatOptions(target=str(t5), load=LOAD), Console(file=io.StringIO()))


def test_sampling_with_beams_is_refused(llama):
    with pytest.raises(models.ConfigError, match=r"num_beams is 2 and temperature 0\.7"):
        said(llama, num_beams=2, sampling=SamplingOptions(temperature=0.7))
