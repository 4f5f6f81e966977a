"""Perplexity of a text: the exponential of the mean negative log-probability of its tokens, words or bytes.

The number depends on how the text is cut, so every result carries the name of its protocol.

`windows`: the text is tokenized whole, without special tokens, and cut into windows of 512 tokens (or as many as
asked for) that do not overlap; the first token of a window has nothing before it and is not scored. A rest shorter
than a window is left out, unless it is all there is. Documents (JSON lines) are joined by blank lines.

`gptq`: as papers on quantization report it. The rows of WikiText, a line each with its newline and blank ones empty,
are joined by blank lines and tokenized whole, with the beginning-of-text token where the tokenizer puts one; windows
are of 2,048 tokens, and the rest is always left out.

`harness`: the lm-evaluation-harness's task `wikitext`, article by article (`eval/wikitext.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.data.texts import DOCUMENTS, SPLITS, holds_documents, read_documents, read_text, text_file
from eval.examinee import Examinee
from eval.likelihood import Likelihood
from eval.ratios import PERPLEXITY, exponential
from eval.request import Request
from eval.scoring import token_losses
from eval.task import Document, Family, Spec, Suite, Task
from eval.wikitext import Wikitext, articles, rows
from models import ConfigError, DataError, Model
from models.llama import causal


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on. `stderr` treats windows as the independent samples."""

    perplexity: float
    mean_nll: float
    stderr: float | None
    tokens: int
    windows: int
    window: int
    protocol: str = "windows"


def perplexity(
    model: Model,
    ids: Sequence[int],
    window: int = 512,
    limit: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    """Perplexity of a tokenized text by the protocol `windows`; `limit` takes the first windows only."""
    model = causal(model, "perplexity")
    if window < 2:
        raise ValueError(f"window is {window}; at least 2 tokens are needed to score one")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; at least one window is needed")
    refuse_short(ids)
    window = min(window, len(ids))
    count = min(len(ids) // window, limit or len(ids))
    table = torch.tensor(ids[: count * window], device=model.device).view(count, window)
    means = torch.cat([token_losses(model, rows).double().mean(dim=1).cpu() for rows in table.split(batch_size)])

    mean = means.mean().item()
    value = exponential(mean)
    # The error of the mean carries over to its exponential by the derivative.
    stderr = value * means.std().item() / math.sqrt(count) if count > 1 else None
    return Perplexity(value, mean, stderr, count * (window - 1), count, window)


def refuse_short(ids: Sequence[int]) -> None:
    if len(ids) < 2:
        raise DataError(f"perplexity: the text has {len(ids)} token(s); at least 2 are needed to score one")


class Windows(Task):
    """Windows of one tokenized text that do not overlap, the first token of each unscored: `windows` and `gptq`."""

    output_type = "loglikelihood_rolling"
    metrics = {"token_perplexity": PERPLEXITY}

    def __init__(
        self, name: str, alias: str, ids: Sequence[int], window: int, examinee: Examinee, settings: dict[str, Any]
    ) -> None:
        self.name, self.alias, self.settings = name, alias, settings
        self.ids = tuple(ids)
        begins = range(0, len(ids) - window + 1, window)
        self.documents = [
            {"begin": begin, "end": begin + window, "text": examinee.tokenizer.decode(ids[begin : begin + window])}
            for begin in begins
        ]

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        first, *rest = self.ids[document["begin"] : document["end"]]
        return [
            Likelihood(context_ids=(first,), continuation_ids=tuple(rest), context="", continuation=document["text"])
        ]

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        return {"token_perplexity": (answers[0][0], document["end"] - document["begin"] - 1)}

    def target(self, document: Document) -> Any:
        return None

    def prompt(self, document: Document, examinee: Examinee) -> dict[str, Any]:
        return {"task": self.name, "input": document["text"], "output": None}


def build(spec: Spec) -> Suite:
    """The task `perplexity`, or `wikitext`, which is it by the protocol `harness` unless another one is named."""
    examinee = spec.examinee
    if examinee.architecture != "llama":
        raise ConfigError(
            f"perplexity needs a causal language model (LLaMA), which finds every token from those before it; this "
            f"one is {examinee.architecture.upper()}"
        )
    if spec.data is None:
        raise ConfigError(f"{spec.name} needs data: {FAMILY.data}")
    protocol = spec.protocol or ("harness" if spec.name == "wikitext" else "windows")
    return Suite([PROTOCOLS[protocol](spec, text_file(spec.data, spec.split), f"{spec.name} ({protocol})")])


def windows_task(spec: Spec, path: Path, alias: str) -> Task:
    """A file's text as it is, or its documents with blank lines between them."""
    parts = read_documents(path, spec.max_chars) if holds_documents(path) else [read_text(path, spec.max_chars)]
    ids = spec.examinee.tokenizer.encode("\n\n".join(parts))
    refuse_short(ids)
    window = min(window_of(spec, 512), len(ids))
    return Windows(spec.name, alias, ids, window, spec.examinee, settings(spec, path, "windows", window))


def gptq_task(spec: Spec, path: Path, alias: str) -> Task:
    """Rows are a text's lines, or the documents of a JSON file."""
    documents = path.suffix.lower() in DOCUMENTS
    parts = read_documents(path, spec.max_chars) if documents else rows(read_text(path, spec.max_chars))
    ids, window = spec.examinee.encode("\n\n".join(parts)), window_of(spec, 2048)
    if len(ids) < window:
        raise DataError(
            f"data: {path}: has {len(ids)} tokens, and the protocol gptq takes whole windows of {window} only; "
            "give a longer text, a smaller window, or the protocol windows"
        )
    return Windows(spec.name, alias, ids, window, spec.examinee, settings(spec, path, "gptq", window))


def harness_task(spec: Spec, path: Path, alias: str) -> Task:
    """Documents are a text's articles, or those of a JSON file; blank ones are passed over."""
    documents = path.suffix.lower() in DOCUMENTS
    pages = read_documents(path, spec.max_chars) if documents else articles(read_text(path, spec.max_chars))
    window = window_of(spec, spec.examinee.max_tokens)
    pages = [page for page in pages if page.strip()]
    return Wikitext(spec.name, alias, pages, window, settings(spec, path, "harness", window))


def window_of(spec: Spec, default: int) -> int:
    """Tokens in a window: as asked for, or the protocol's number, which is never lowered in silence."""
    window = default if spec.window is None else spec.window
    most = spec.examinee.max_tokens
    if window < 2:
        raise ConfigError(f"window is {window}; at least 2 tokens are needed to score one")
    if window > most:
        raise ConfigError(
            f"window is {window}, but the model takes {most} tokens at once; choose a window of {most} or less"
        )
    return window


def settings(spec: Spec, path: Path, protocol: str, window: int) -> dict[str, Any]:
    found = {"data": str(path), "protocol": protocol, "window": window}
    return found if spec.max_chars is None else {**found, "max_chars": spec.max_chars}


PROTOCOLS: dict[str, Callable[[Spec, Path, str], Task]] = {
    "windows": windows_task,
    "gptq": gptq_task,
    "harness": harness_task,
}
FAMILY = Family(
    name="perplexity",
    summary="how well the model predicts a text: per token, or per word and byte as the harness does (wikitext)",
    build=build,
    names=("wikitext",),
    protocols=tuple(PROTOCOLS),
    splits=tuple(SPLITS),
    data="a UTF-8 text file, JSON lines with a text or page each, or a folder with wiki.test.raw or test.txt",
)
