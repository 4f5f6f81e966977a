"""Everything that evaluation does, done once by however many processes there are, for its results to be compared.

`Bench` is the folder with checkpoints and data. Models run in float32, so batches that are the same give the same bits.
"""

import io
import json
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.fsdp import FSDPModule

import models
from eval import command, generate
from eval.answering import answer_all
from eval.cache import Cache
from eval.command import EvalOptions
from eval.examinee import Examinee
from eval.generate import GenerateOptions, SamplingOptions
from eval.generation import generation
from eval.held_out import held_out_loss
from eval.labelling import label
from eval.labels import agreement, predict
from eval.likelihood import Likelihood, likelihood
from eval.loading import load_examinee
from eval.mmlu.tracking import Examination
from eval.pseudo import pseudo_likelihoods
from eval.task import Spec
from models.parallel import world
from models.parallel.shard import shard
from models.parallel.shares import is_shared
from models.target import LoadOptions
from tests import tiny, tiny_mmlu, tiny_roberta, tiny_t5
from train.run import Run
from train.samples import Sampler

WORDS = ("red", "blue", "green", "small", "large", "round")
SENTENCES = [
    f"It is {a} and {b}." + f" And {a}." * (n % 4) for n, (a, b) in enumerate(zip(WORDS, WORDS[::-1], strict=True))
]
ROOM = 5  # rows that one process has memory for
LETTERS = [text for text, _ in tiny_roberta.texts(7)]


def bench(folder: Path) -> Path:
    """Write the checkpoints and the data."""
    tiny.checkpoint(folder / "llama")
    tiny_roberta.checkpoint(folder / "masked")
    tiny_roberta.checkpoint(folder / "labels", ("few", "many", "none"))
    tiny_t5.checkpoint(folder / "t5")
    tiny_mmlu.folder(folder / "mmlu", {"anatomy": "BBAC", "virology": "BC"})
    (folder / "text.txt").write_text(" ".join(SENTENCES * 3))
    questions = [{"question_id": n, "text": f"Which colour is {word}?"} for n, word in enumerate(WORDS[:5])]
    (folder / "questions.jsonl").write_text("".join(json.dumps(it) + "\n" for it in questions))
    probes = "".join(f'[[colours]]\nid = "{w}"\nmessages = ["Name {w}"]\nsays = ["{w}"]\n' for w in WORDS[:3])
    (folder / "probes.toml").write_text(probes)
    return folder


def everything(folder: Path, distributed: str) -> dict[str, Any]:
    """All results, by what was done; files are left in a folder of this rank and this number of processes."""
    load = LoadOptions(device="cpu", dtype="float32", distributed=distributed)  # pyrefly: ignore[bad-argument-type]
    out = folder / f"{distributed}-{world.size()}"
    own = out / str(world.rank())
    return {
        "tasks": tasks(folder, out, load),
        "questions": questions(folder, out, load),
        "prompt": prompt(folder, load),
        "masked": masked(folder, load),
        "labels": labels(folder, load),
        "cache": cache(folder, own, load),
        "memory": memory(folder, load),
        "different": different(folder, load),
        "t5": written_by_t5(folder, load),
        "training": training(folder, own, load),
    }


def quiet() -> Console:
    return Console(file=io.StringIO())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tasks(folder: Path, out: Path, load: LoadOptions) -> dict[str, Any]:
    """`qlora eval`: scores, and the files beside them."""
    options = EvalOptions(
        target=str(folder / "llama"),
        task="perplexity,wikitext,mmlu_anatomy,lemons",
        data=(
            f"perplexity={folder / 'text.txt'}",
            f"wikitext={folder / 'text.txt'}",
            f"mmlu_anatomy={folder / 'mmlu'}",
            f"lemons={folder / 'probes.toml'}",
        ),
        window=("perplexity=16", "wikitext=40", "mmlu_anatomy=200"),
        num_fewshot=("mmlu_anatomy=0",),
        batch_size=3,
        out=str(out),
        load=load,
    )
    first = command.command(options, quiet())
    second = command.command(options, quiet())
    world.barrier()
    left = {path.name for path in (out / "llama").iterdir()}
    samples = {path.name.partition("_2")[0]: lines(path) for path in sorted((out / "llama").glob("samples_*"))}
    return {
        "results": first["results"],
        "again": second["results"],
        "samples": samples,
        "lemons": (out / "llama" / "lemons.jsonl").read_text(),
        "files": sorted(name.partition("_2")[0] for name in left if "sqlite" not in name),
    }


def questions(folder: Path, out: Path, load: LoadOptions) -> dict[str, Any]:
    """`qlora generate --questions`, of which one half is there already when it goes on."""
    path = out / "answers" / "model.jsonl"
    options = GenerateOptions(
        target=str(folder / "llama"),
        questions=str(folder / "questions.jsonl"),
        out=str(path),
        max_new_tokens=9,
        batch_size=2,
        load=load,
    )
    first = generate.command(options, quiet())["answered"]
    world.barrier()
    rows = path.read_text()
    world.barrier()
    if world.is_main():
        path.write_text("".join(f"{row}\n" for row in rows.splitlines()[1::2]))
    world.barrier()
    second = generate.command(options, quiet())["answered"]
    world.barrier()
    return {"answered": (first, second), "rows": rows, "again": path.read_text() == rows}


def prompt(folder: Path, load: LoadOptions) -> list[str]:
    """`qlora generate --prompt`: greedy, sampled, and by beam search."""
    how: list[dict[str, Any]] = [{}, {"sampling": SamplingOptions(temperature=1.0), "seed": 3}, {"num_beams": 2}]
    common: dict[str, Any] = {"target": str(folder / "llama"), "prompt": "It is", "max_new_tokens": 6, "load": load}
    return [generate.command(GenerateOptions(**common, **it), quiet())["text"] for it in how]


def masked(folder: Path, load: LoadOptions) -> list[Any]:
    """Requests of several passes each, and not as many in every batch."""
    who = load_examinee(folder / "masked", load)
    return answer_all(who, [it for pair in pairwise(LETTERS) for it in pseudo_likelihoods(who, *pair)], 3)


def labels(folder: Path, load: LoadOptions) -> dict[str, Any]:
    """Logits as they are asked for, and as they are held out; the last batch is this process's or it is not."""
    who = load_examinee(folder / "labels", load)
    found = predict(who.model, label_batches(who))  # pyrefly: ignore[bad-argument-type]
    return {
        "asked": answer_all(who, [label(who, [text]) for text in LETTERS], 2),
        "logits": found.logits,
        "labels": found.labels,
        "loss": found.loss,
        "agreement": agreement(found, ("accuracy",)),
    }


def label_batches(who: Examinee) -> list[dict[str, torch.Tensor]]:
    batches = []
    for number, text in enumerate(LETTERS[:5]):
        ids = torch.tensor([label(who, [text]).ids, label(who, [text[::-1]]).ids])
        batches.append({"input_ids": ids, "labels": torch.tensor([number % 3, -100 if number == 2 else 1])})
    return batches


def cache(folder: Path, own: Path, load: LoadOptions) -> dict[str, Any]:
    """How many rows are asked of the model in all: at first, once more, and with a half of the answers gone."""
    own.mkdir(parents=True, exist_ok=True)
    who = load_examinee(folder / "llama", load)
    requests = [likelihood(who, text, f" {word}") for text in SENTENCES for word in WORDS[:2]]
    answers, asked = [], []
    for _ in range(3):
        kept = Cache(own / "answers.sqlite" if world.is_main() else None)
        with Counted() as counted:
            answers.append(answer_all(who, requests, 4, kept))
        kept.close()
        asked.append(round(world.sums(counted.rows)[0]))
        if world.is_main() and len(asked) == 2:
            file = sqlite3.connect(own / "answers.sqlite")
            half = file.execute("SELECT key FROM answers").fetchall()[::2]
            file.executemany("DELETE FROM answers WHERE key = ?", half)
            file.commit()
            file.close()
    return {"asked": asked, "answers": answers}


class Counted:
    """Counts the rows that this process is asked."""

    def __enter__(self) -> "Counted":
        self.rows, self.answer = 0, Likelihood.__dict__["answer"]

        def counting(cls: type, examinee: Examinee, rows: Sequence[Any]) -> Any:
            self.rows += len(rows)
            return self.answer.__func__(cls, examinee, rows)

        Likelihood.answer = classmethod(counting)  # pyrefly: ignore
        return self

    def __exit__(self, *_: object) -> None:
        Likelihood.answer = self.answer


def different(folder: Path, load: LoadOptions) -> str:
    """What is said where each process asks something else."""
    who = load_examinee(folder / "llama", load)
    try:
        answer_all(who, [likelihood(who, SENTENCES[world.rank()], " red")])
    except models.DataError as error:
        return str(error)
    return ""


def memory(folder: Path, load: LoadOptions) -> dict[str, Any]:
    """The main process has room for few rows: before the blocks, in one of them, behind them, and in a T5's cache.

    Gives answers, and how many rows this process tried at most and at last, for each of these places.
    """
    llama, t5 = load_examinee(folder / "llama", load), load_examinee(folder / "t5", load)
    inside: Any = llama.model.get_submodule("model")
    reading = t5.model.get_submodule("decoder.block.1.layer.1.EncDecAttention")
    found: dict[str, Any] = {"answers": [], "largest": [], "last": []}
    for who, place, name in (
        (llama, inside.embed_tokens, "forward"),
        (llama, inside.layers[0], "forward"),
        (llama, inside.norm, "forward"),
        (t5, reading, "keys_and_values"),
    ):
        requests = [likelihood(who, f"{text} {n}", " red") for n in range(4) for text in SENTENCES]
        written = [generation(who, f"{text} {n}", 14 + n) for n in range(2) for text in SENTENCES]  # longer, so first
        sizes: list[int] = []
        wide = getattr(place, name)
        setattr(place, name, partial(narrow, wide, sizes))
        found["answers"].append(answer_all(who, [*requests, *written]))
        setattr(place, name, wide)
        found["largest"].append(max(sizes))
        found["last"].append(sizes[-1])
    methods = [getattr(who.model, name) for who in (llama, t5) for name in who.model.entries]
    return {**found, "left": [type(method).__name__ for method in methods]}


def narrow(wide: Callable[..., Any], sizes: list[int], x: torch.Tensor, *rest: Any) -> Any:
    """What a module gives, or no memory for it."""
    if x.shape[1] > 1:  # neither a step of writing nor a pass for others
        sizes.append(len(x))
    if len(x) > ROOM and world.is_main():
        raise torch.OutOfMemoryError("CUDA out of memory")
    return wide(x, *rest)


def training(folder: Path, own: Path, load: LoadOptions) -> dict[str, Any]:
    """What looks at a model while it learns, before the first step and after one; and the step."""
    model = models.load(folder / "llama", dtype=torch.float32)
    torch.manual_seed(0)
    models.attach_lora(model, models.LoraConfig(rank=4, dropout=0.0))
    if world.size() > 1 and load.distributed == "fsdp":
        shard(model, torch.device("cpu"))
    tokenizer = models.load_tokenizer(folder / "llama")
    who = Examinee(tokenizer=tokenizer, architecture="llama", max_tokens=256)
    spec = Spec(name="mmlu_anatomy", examinee=who, data=folder / "mmlu", split="val", num_fewshot=1, window=200)
    examination = Examination(spec)
    prompts = tuple(tuple(tokenizer.encode(text)) for text in SENTENCES[:3])
    own.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(model, tokenizer, prompts, 5, Run(own))
    batches = loss_batches(tokenizer)

    found: dict[str, Any] = {"lines": [], "held_out": [], "mmlu": []}
    model.train()
    for step in range(2):
        found["held_out"].append(vars(held_out_loss(model, batches)))
        found["lines"] += sampler(step)
        found["mmlu"].append(vars(examination.take(model, 2)))
        assert model.training
        assert is_shared(model.embedding.weight) == isinstance(model, FSDPModule)
        if step == 0:
            learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
            model.loss(**batches[0]).backward()
            with torch.no_grad():
                for name, p in learned.items():
                    assert p.grad is not None, name
                    p -= 0.5 * p.grad / (world.size() if isinstance(model, FSDPModule) else 1)  # all had one batch
    found["samples"] = lines(own / "eval" / "samples.jsonl")
    return found


def loss_batches(tokenizer: models.Tokenizer) -> list[dict[str, torch.Tensor]]:
    """Six batches, of which one has no label."""
    batches = []
    for number, text in enumerate(SENTENCES):
        ids = torch.tensor([tokenizer.encode(text)])
        learned = torch.arange(ids.shape[1]) >= number
        batches.append({"input_ids": ids, "labels": ids.where(learned & (number != 1), torch.tensor(-100))})
    return batches


def written_by_t5(folder: Path, load: LoadOptions) -> list[Any]:
    """Encoders that have to run while decoders do."""
    who = load_examinee(folder / "t5", load)
    asked = [generation(who, text, 3 + 2 * (n % 3)) for n, text in enumerate(SENTENCES)]
    return answer_all(who, [*asked, *(likelihood(who, text, " red and blue") for text in SENTENCES)], 2)
