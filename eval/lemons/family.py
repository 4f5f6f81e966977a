"""Lemon-picking: probes that are put to a chatbot as in the paper's qualitative section, one task for each category.

The share of probes that pass is a score, but a small one: what counts are the answers, which are left beside the
results as `lemons.jsonl` and, for reading, as `lemons.html`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from eval.examinee import Examinee
from eval.generation import Generate, generation
from eval.lemons.checks import Checks, judge
from eval.lemons.page import Row, Sheet, as_html, sheet_name
from eval.lemons.probes import CATEGORIES, SHIPPED, Message, Probe, read_probes
from eval.statistics import MEAN
from eval.task import Document, Family, Group, Spec, Suite, Task
from models import ConfigError, render_chat
from models.chat import CHATML_END, CHATML_START
from models.files import write_whole

MAX_NEW_TOKENS = 256
STOP = ("### Human:", "\nUser:")  # where a model goes on in the user's name
SPEAKERS = {"user": "User: ", "assistant": "Assistant: ", "system": ""}


@dataclass
class Answered:
    """Rows of all categories, so that they end in one file."""

    rows: dict[str, list[Row]] = field(default_factory=dict)


class LemonsTask(Task):
    """The probes of one category."""

    output_type = "generate_until"
    metrics: Mapping[str, Any] = {"acc": MEAN}

    def __init__(self, category: str, probes: Sequence[Probe], protocol: str, data: str, answered: Answered) -> None:
        self.name, self.alias, self.protocol, self.answered = f"lemons_{category}", category, protocol, answered
        self.category = category
        self.documents = [
            {
                "id": it.id,
                "category": category,
                "messages": it.chat,
                "note": it.note,
                "checks": asdict(it.checks),
            }
            for it in probes
        ]
        self.settings = {"data": data, "protocol": protocol, "max_new_tokens": MAX_NEW_TOKENS}

    def requests(self, document: Document, examinee: Examinee) -> list[Generate]:
        """The chat in the model's own form, or as a dialogue in plain text."""
        room = min(MAX_NEW_TOKENS, examinee.max_tokens // 2)
        if self.protocol == "chat":
            ids, _ = render_chat(examinee.tokenizer, document["messages"], add_generation_prompt=True)
            prompt = examinee.tokenizer.decode(ids, skip_special=False)
            return [generation(examinee, prompt, room, STOP, ids=ids)]
        prompt = dialogue(document["messages"])
        plain = (
            examinee.tokenizer.encode(prompt, eos=True) if examinee.architecture == "t5" else examinee.encode(prompt)
        )
        return [generation(examinee, prompt, room, STOP, ids=plain)]

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        return {"acc": float(all(it.passed for it in judge(checks_of(document), answers[0])))}

    def target(self, document: Document) -> str:
        return checks_of(document).words

    def write(self, directory: Path, documents: Sequence[Document], answers: Sequence[Sequence[Any]]) -> list[Path]:
        """The answers with the checks that decided, as lines of JSON and as a page; whole after the last category."""
        first = not self.answered.rows
        self.answered.rows[self.category] = [
            row(document, given[0]) for document, given in zip(documents, answers, strict=True)
        ]
        rows = [it for rows in self.answered.rows.values() for it in rows]
        lines, page = directory / "lemons.jsonl", directory / "lemons.html"
        write_whole(lines, "".join(json.dumps(it, ensure_ascii=False) + "\n" for it in rows))
        write_whole(page, as_html([Sheet(sheet_name(directory), rows)]))
        return [lines, page] if first else []


def row(document: Document, answer: str) -> Row:
    """What a report needs to know of one answer."""
    verdicts = judge(checks_of(document), answer)
    return {
        **{name: document[name] for name in ("category", "id", "messages", "note")},
        "answer": answer,
        "passed": all(it.passed for it in verdicts),
        "checks": [{"check": it.check, "passed": it.passed, "found": it.found and list(it.found)} for it in verdicts],
    }


def checks_of(document: Document) -> Checks:
    given = document["checks"]
    says, avoids = tuple(given["says"]), tuple(given["avoids"])
    return Checks(says=says, avoids=avoids, number=given["number"], secret=given["secret"], complies=given["complies"])


def form(examinee: Examinee) -> str:
    """The protocol for a model: chat where it has a chat form of its own or one is asked for, else plain."""
    own = {CHATML_START, CHATML_END} <= examinee.tokenizer.special_tokens.keys()
    return "chat" if examinee.architecture == "llama" and (own or examinee.chat) else "plain"


def dialogue(messages: Sequence[Message]) -> str:
    """A chat for a model that knows no chats, up to where the answer begins.

    >>> dialogue([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
    'Be kind.\\n\\nUser: Hello\\nAssistant:'
    """
    lines = [SPEAKERS[it["role"]] + it["content"] + ("\n" if it["role"] == "system" else "") for it in messages]
    return "\n".join([*lines, "Assistant:"])


def build(spec: Spec) -> Suite:
    """The categories of the shipped probes or of a file of one's own, or one of them."""
    if spec.examinee.architecture == "roberta":
        raise ConfigError(f"{spec.name} needs a model that writes, a LLaMA or a T5; this one is a RoBERTa")
    if spec.num_fewshot:
        raise ConfigError(f"{spec.name} has no solved examples to show; num_fewshot is {spec.num_fewshot}")
    protocol = form(spec.examinee) if spec.protocol in (None, "auto") else spec.protocol
    if protocol == "chat" and spec.examinee.architecture != "llama":
        raise ConfigError(f"{spec.name}: a T5 has no chat form; leave the protocol to auto, or give plain")
    path = SHIPPED if spec.data is None else spec.data / SHIPPED.name if spec.data.is_dir() else spec.data
    if not path.exists() and path != spec.data:
        path = SHIPPED  # a folder with the data of other tasks
    probes = read_probes(path)
    data = f"{path.name} {sha256(path.read_bytes()).hexdigest()[:16]}"
    answered = Answered()
    categories = list(dict.fromkeys(it.category for it in probes))
    tasks = [
        LemonsTask(name, [it for it in probes if it.category == name], protocol, data, answered)
        for name in categories
        if spec.name in (FAMILY.name, f"lemons_{name}")
    ]
    if not tasks:
        raise ConfigError(f"{path} has no category {spec.name.removeprefix('lemons_')}; it has {', '.join(categories)}")
    groups = [Group(FAMILY.name, tuple(it.name for it in tasks))] if spec.name == FAMILY.name else []
    return Suite(tasks, groups)


FAMILY = Family(
    name="lemons",
    summary="probes that show how a chatbot fails: facts, false premises, refusals, secrets, sums, other minds",
    build=build,
    names=tuple(f"lemons_{category}" for category in CATEGORIES),
    protocols=("auto", "chat", "plain"),
    data="nothing: the probes are shipped; or a TOML file of one's own, as eval/lemons/probes.py describes",
)
