"""Files of any content: loading them gives a model, an adapter or a tokenizer, or one CheckpointError; never another
exception, and never a wait.

Each file starts as a good one. Its JSON gets other values in places, or its bytes are changed, cut or doubled.
"""

import argparse
import contextlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import models
import nf4
from models.gguf_writer import write_gguf
from models.linear import NF4Linear
from models.llama import causal
from models.methods import detach
from tests import tiny
from tests.golden import GOLDEN

fuzz = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# JSON values of every type, with the numbers that break arithmetic. As few layers as a hand can count are really
# built, so that no example takes long.
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**12, 10**400, 1e308, 1e-320, float("nan"), float("inf"), -0.0, 0.5])
    | st.sampled_from(["", "nf4", "llama", "linear", "../x", "\ud800", "(a+)+$", "model.norm.weight", "float8", "0"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def edits(draw: Any) -> list[tuple[int, Any]]:
    """Which of a document's places, counted through, get which values; DELETE takes one out."""
    return draw(st.lists(st.tuples(st.integers(0, 10**6), values | st.just(DELETE)), min_size=1, max_size=4))


DELETE = "<delete>"


def edited(document: Any, changes: list[tuple[int, Any]]) -> Any:
    """The document with those changes."""
    document = json.loads(json.dumps(document))
    for place, value in changes:
        places = list(walk(document))
        if not places:
            return document
        holder, key = places[place % len(places)]
        if isinstance(value, str) and value == DELETE:
            del holder[key]
        else:
            holder[key] = value
    return document


def walk(node: Any) -> Any:
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from walk(node[key])


@st.composite
def damage(draw: Any) -> list[tuple[str, int, int]]:
    kinds = st.sampled_from(["set", "insert", "cut", "drop"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))


def damaged(data: bytes, changes: list[tuple[str, int, int]], span: int | None = None) -> bytes:
    """Bytes changed somewhere in the first `span`."""
    out = bytearray(data)
    for kind, place, byte in changes:
        if not out:
            break
        i = place % min(len(out), span or len(out))
        if kind == "set":
            out[i] = byte
        elif kind == "insert":
            out[i:i] = bytes([byte]) * (byte % 9 + 1)
        elif kind == "drop":
            del out[i : i + byte % 9 + 1]
        else:
            del out[len(out) - byte :]
    return bytes(out)


def survives(action: Any) -> None:
    """Success and refusal are both fine."""
    with contextlib.suppress(models.CheckpointError):
        action()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shutil.copytree(GOLDEN / "llama-gqa", tmp_path_factory.mktemp("fuzz") / "plain")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "stored"
    models.save(models.load(GOLDEN / "llama-gqa", nf4.QuantConfig()), directory)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "sharded"
    models.save(models.load(GOLDEN / "llama-gqa"), directory, shard_bytes=60_000)
    return directory


@contextlib.contextmanager
def changed(file: Path, change: Any) -> Any:
    """The file with what `change` makes of its bytes, for a while."""
    good = file.read_bytes()
    file.write_bytes(change(good))
    try:
        yield
    finally:
        file.write_bytes(good)


def as_json(changes: list[tuple[int, Any]]) -> Any:
    """The edits of a file that is JSON."""
    return lambda data: json.dumps(edited(json.loads(data), changes)).encode()


@fuzz
@given(changes=edits())
@pytest.mark.parametrize("case", ["llama-gqa", "llama3-rope-tied"])
def test_a_config_with_other_values(checkpoint, case, changes):
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(edited(raw, changes)))
    survives(lambda: models.load(checkpoint))


@fuzz
@given(changes=edits())
@pytest.mark.parametrize("case", ["t5-v1_0", "t5-v1_1", "roberta-mlm", "roberta-classify"])
def test_the_config_of_another_architecture_with_other_values(tmp_path, case, changes):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / case / file, tmp_path)
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(edited(raw, changes)))
    survives(lambda: models.load(tmp_path))


@fuzz
@given(changes=edits())
def test_a_fairseq_file_with_other_arguments(tmp_path, changes):
    saved = fairseq_file()
    cfg = {"model": edited(dict(vars(saved["args"])), changes)}
    torch.save({"model": saved["model"], "cfg": cfg}, tmp_path / "model.pt")
    survives(lambda: models.load(tmp_path / "model.pt"))


@cache
def fairseq_file() -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "roberta-fairseq" / "model.pt", weights_only=True)


@fuzz
@given(changes=edits())
def test_a_config_of_4_bit_weights_with_other_values(stored, changes):
    with changed(stored / "config.json", as_json(changes)):
        survives(lambda: models.load(stored))


@fuzz
@given(changes=damage())
def test_a_config_with_other_bytes(checkpoint, changes):
    (checkpoint / "config.json").write_bytes(damaged((GOLDEN / "llama-gqa" / "config.json").read_bytes(), changes))
    survives(lambda: models.load(checkpoint))


@fuzz
@given(changes=edits())
def test_a_generation_config_with_other_values(checkpoint, changes):
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", checkpoint)
    good = {"eos_token_id": [2, 3], "bos_token_id": 1}
    (checkpoint / "generation_config.json").write_text(json.dumps(edited(good, changes)))
    survives(lambda: models.load(checkpoint))
    (checkpoint / "generation_config.json").unlink()


def header_edits(changes: list[tuple[int, Any]]) -> Any:
    """The edits of a safetensors file's JSON header."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = as_json(changes)(data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    return change


@fuzz
@given(changes=edits())
@pytest.mark.parametrize("which", ["plain", "stored"])
def test_a_safetensors_header_with_other_values(checkpoint, stored, which, changes):
    directory = checkpoint if which == "plain" else stored
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", checkpoint)
    with changed(directory / "model.safetensors", header_edits(changes)):
        survives(lambda: models.load(directory))


@fuzz
@given(changes=damage())
def test_a_safetensors_header_with_other_bytes(checkpoint, changes):
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", checkpoint)
    with changed(checkpoint / "model.safetensors", lambda data: damaged(data, changes, span=2500)):
        survives(lambda: models.load(checkpoint))


@fuzz
@given(changes=edits())
def test_a_quant_state_with_other_values(stored, changes):
    def one_state(data: bytes) -> bytes:
        start = data.index(b'{"quant_type"')
        end = data.index(b"}", start) + 1
        return data[:start] + as_json(changes)(data[start:end])[: end - start].ljust(end - start) + data[end:]

    with changed(stored / "model.safetensors", one_state):
        survives(lambda: models.load(stored))


@fuzz
@given(changes=edits())
def test_an_index_with_other_values(sharded, changes):
    with changed(sharded / "model.safetensors.index.json", as_json(changes)):
        survives(lambda: models.load(sharded))


@fuzz
@given(changes=damage())
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_with_other_bytes(tmp_path, zipped, changes):
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(load_file(GOLDEN / "llama-gqa" / "model.safetensors"), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(damaged(file.read_bytes(), changes, span=4000))
    survives(lambda: models.load(tmp_path))


@fuzz
@given(changes=edits())
def test_params_json_with_other_values(tmp_path, changes):
    if not (tmp_path / "params.json").exists():
        shutil.copytree(GOLDEN / "llama-raw-2", tmp_path, dirs_exist_ok=True)
    raw = json.loads((GOLDEN / "llama-raw-2" / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(edited(raw, changes)))
    survives(lambda: models.load(tmp_path))


# Adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = shutil.copytree(GOLDEN / "lora", tmp_path_factory.mktemp("fuzz") / "adapter")
    return directory, models.load(GOLDEN / "llama-gqa", dtype=torch.float32)


def put_on(adapter: tuple[Path, models.Model]) -> None:
    directory, model = adapter
    before = {name for name, _ in model.named_parameters()}
    try:
        survives(lambda: models.load_adapter(model, directory))
    finally:
        detach(model)
    assert {name for name, _ in model.named_parameters()} == before


@fuzz
@given(changes=edits())
def test_an_adapters_config_with_other_values(adapter, changes):
    good = json.loads((GOLDEN / "lora" / "adapter_config.json").read_text())
    (adapter[0] / "adapter_config.json").write_text(json.dumps(edited(good, changes)))
    put_on(adapter)


@fuzz
@given(
    key=st.sampled_from(["r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern"]),
    value=values,
)
def test_an_adapters_config_with_another_value_where_it_counts(adapter, key, value):
    good = json.loads((GOLDEN / "lora" / "adapter_config.json").read_text())
    (adapter[0] / "adapter_config.json").write_text(json.dumps({**good, key: value}))
    put_on(adapter)


@fuzz
@given(changes=edits())
def test_an_adapters_header_with_other_values(adapter, changes):
    shutil.copy(GOLDEN / "lora" / "adapter_config.json", adapter[0])
    with changed(adapter[0] / "adapter_model.safetensors", header_edits(changes)):
        put_on(adapter)


# GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("gguf")
    directory = tmp_path_factory.mktemp("fuzz")
    source = tiny.checkpoint(directory / "tiny")
    write_gguf(causal(models.load(source), "a GGUF"), models.load_tokenizer(source), directory / "m.gguf", "q8_0")
    return directory / "m.gguf"


@fuzz
@given(changes=damage(), metadata=st.booleans())
def test_a_gguf_with_other_bytes(gguf, metadata, changes):
    path = gguf.with_name("damaged.gguf")
    path.write_bytes(damaged(gguf.read_bytes(), changes, span=900 if metadata else 40_000))
    survives(lambda: models.load(path))
    survives(lambda: models.load_tokenizer(path).encode("It is red."))


# Tokenizers


TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """A directory of each kind, with the JSON files in it that are to be edited."""
    root = tmp_path_factory.mktemp("fuzz")
    tiny.checkpoint(root / "merges")
    tokenizer = models.load_tokenizer(root / "merges")
    vocab = json.loads((root / "merges" / "vocab.json").read_text())
    lines = (root / "merges" / "merges.txt").read_text().splitlines()
    merges = [(line.split(" ")[0], line.split(" ")[1]) for line in lines if not line.startswith("#")]
    (root / "json").mkdir()
    content = models.tokenizer_json.write_tokenizer_json(vocab, merges, "smollm", tokenizer.special_tokens)
    (root / "json" / "tokenizer.json").write_bytes(content)
    settings: dict[str, Any] = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "x",
    }
    settings["added_tokens_decoder"] = {"0": {"content": "<|endoftext|>", "special": True}}
    for kind in ("merges", "json"):
        (root / kind / "tokenizer_config.json").write_text(json.dumps(settings))
        (root / kind / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|im_end|>"}))
        (root / kind / "added_tokens.json").write_text(
            json.dumps({"<|im_end|>": tokenizer.special_tokens["<|im_end|>"]})
        )
    return root


@fuzz
@given(changes=edits())
@pytest.mark.parametrize(
    "file",
    [
        "merges/vocab.json",
        "merges/tokenizer_config.json",
        "merges/special_tokens_map.json",
        "merges/added_tokens.json",
        "json/tokenizer.json",
    ],
)
def test_a_tokenizer_with_other_values(tokenizer_files, file, changes):
    path = tokenizer_files / file
    with changed(path, as_json(changes)):
        survives(lambda: models.load_tokenizer(path.parent).encode("It is red, 12\n"))


@fuzz
@given(changes=damage())
@pytest.mark.parametrize("file", ["merges/merges.txt", "json/tokenizer.json"])
def test_a_tokenizer_with_other_bytes(tokenizer_files, file, changes):
    path = tokenizer_files / file
    with changed(path, lambda data: damaged(data, changes)):
        survives(lambda: models.load_tokenizer(path.parent).encode("It is red, 12\n"))


# A model that came through is a model


def test_what_is_loaded_is_usable(stored):
    model = models.load(stored)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    assert bool(model(torch.arange(9)[None]).isfinite().all())
