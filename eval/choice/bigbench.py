"""BIG-bench's JSON tasks: multiple choice by likelihood, and answers that are written and compared.

A prompt is task_prefix, then examples joined by few_shot_example_separator, then the question; each question is
example_input_prefix, input, the choices (if append_choices_to_input) in a shuffled order that is the same each time,
and example_output_prefix. Defaults of all keys are BIG-bench's. Examples are drawn for every question from the others
of the task, so all are scored; an example shows the first of its best answers.

- multiple_choice_grade: the score (target_scores) of the choice whose log-probability is the largest in sum; of equal
  ones the first counts, where BIG-bench draws one by a hash. Several choices may have score 1.
- exact_str_match: 1 if the answer is a target, white space at the ends aside. At most 128 tokens are written, greedily.
  Of these, what is before stop_string counts, and of that the first match of output_regex. A task that gives neither
  takes BIG-bench's default, up to the first of . ? ! ; and the line's end.

A task is scored by those of the two that its `metrics` list; if neither is there, by what its examples allow.
preferred_score is the one of them that the task prefers, and what a group's tasks have in common: the group is their
plain mean, not normalized by chance and expert scores, which the task files do not hold.
"""

import json
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from eval.choice.bigbench_files import checked, stop_rule, task_files
from eval.choice.reading import documents, place
from eval.choice.task import best, few
from eval.examinee import Examinee
from eval.generation import generation
from eval.likelihood import likelihood
from eval.request import Request
from eval.statistics import MEAN
from eval.task import Document, Family, Group, Spec, Suite, Task
from models import ConfigError, DataError

MAX_NEW_TOKENS = 128
SHUFFLE = 42  # the seed of the order in which choices are shown, as in the harness
GRADE, MATCH, PREFERRED = "multiple_choice_grade", "exact_str_match", "preferred_score"


class BigBench(Task):
    """One task.json."""

    version = 1

    def __init__(self, name: str, whole: Document, num_fewshot: int, seed: int, source: str) -> None:
        """`whole` is what `checked` makes of the file."""
        self.name = self.alias = name
        self.num_fewshot, self.seed = num_fewshot, seed
        self.wording, self.append_choices = whole, whole["append_choices_to_input"]
        self.stop, self.pattern = stop_rule(whole)
        self.documents = whole["examples"]
        if num_fewshot >= len(self.documents):
            raise ConfigError(
                f"num_fewshot is {num_fewshot}, but {source} has {len(self.documents)} different examples"
            )
        self.places = {json.dumps(it): number for number, it in enumerate(self.documents)}
        self.metrics = dict.fromkeys([*measured(whole, self.documents), PREFERRED], MEAN)
        self.output_type = "multiple_choice" if GRADE in self.metrics else "generate_until"
        self.settings = {"data": source, "preferred_score": whole.get(PREFERRED)}

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        context = self.context(document)
        found: list[Request] = []
        if GRADE in self.metrics:
            found += [likelihood(examinee, context, choice) for choice in document.get("target_scores", ())]
        if MATCH in self.metrics:
            stop = (self.stop,) if self.stop else ()
            found.append(generation(examinee, context, MAX_NEW_TOKENS, stop))
        return found

    def context(self, document: Document) -> str:
        """The whole prompt of a document."""
        shown = []
        if self.num_fewshot:
            place = self.places[json.dumps(document)]
            others = Random(f"{self.seed} {place}").sample(range(len(self.documents) - 1), self.num_fewshot)
            for number in others:
                other = self.documents[number + (number >= place)]
                shown.append(self.asked(other) + targets(other)[0])
        return self.wording["task_prefix"] + self.wording["few_shot_example_separator"].join(
            [*shown, self.asked(document)]
        )

    def asked(self, document: Document) -> str:
        """A question, up to where its answer begins."""
        wording, choices = self.wording, ""
        if self.append_choices and "target_scores" in document:
            ordered = sorted(document["target_scores"])
            order = np.random.RandomState(SHUFFLE).permutation(len(ordered))
            choices = "".join(f"{wording['choice_prefix']}{ordered[number]}" for number in order)
        return f"{wording['example_input_prefix']}{document['input']}{choices}{wording['example_output_prefix']}"

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        scores, found = document.get("target_scores"), {}
        if GRADE in self.metrics and scores:
            found[GRADE] = float(list(scores.values())[best([answer[0] for answer in answers[: len(scores)]])])
        if MATCH in self.metrics:
            wanted = {target.removesuffix(self.stop).strip() for target in targets(document)}
            found[MATCH] = float(self.answered(answers[-1]) in wanted)
        return {**found, PREFERRED: next(found[metric] for metric in self.metrics if metric in found)}

    def answered(self, written: str) -> str:
        """The part of what was written that counts as the answer."""
        if self.pattern is None:
            return written.strip()
        match = self.pattern.search(written)
        return match[self.pattern.groups].strip() if match and match[self.pattern.groups] else ""

    def target(self, document: Document) -> list[str]:
        return targets(document)

    def prompt(self, document: Document, examinee: Examinee) -> dict[str, Any]:
        return {"task": self.name, "input": self.context(document), "output": targets(document)[0]}


def targets(document: Document) -> list[str]:
    """The right answers: those given, else the choices with the highest score."""
    if "target" in document:
        return document["target"]
    scores: Mapping[str, float] = document["target_scores"]
    return [choice for choice, score in scores.items() if score == max(scores.values())]


def measured(whole: Document, found: Sequence[Document]) -> list[str]:
    """The metrics of a task, the preferred one first."""
    graded, listed = any("target_scores" in it for it in found), whole.get("metrics")
    listed = listed if isinstance(listed, list) else []
    wanted = [metric for metric in (GRADE, MATCH) if metric in listed and (metric == MATCH or graded)]
    wanted = wanted or [GRADE if graded else MATCH]
    if GRADE in wanted and MATCH not in wanted and not all("target_scores" in it for it in found):
        wanted.append(MATCH)  # what has no choices is not left unscored
    return sorted(wanted, key=lambda metric: metric != whole.get(PREFERRED))


def build(spec: Spec) -> Suite:
    """A task of each task file; more than one make a group."""
    data, number = place(spec, FAMILY.data).absolute(), few(spec.num_fewshot)
    tasks = []
    for path in task_files(data):
        found = documents(path, checked)
        if len(found) > 1:
            raise DataError(f"data: {path}: has {len(found)} records; one BIG-bench task is expected")
        parts = (path.parent if path.name == "task.json" else path.with_suffix("")).parts
        inside = parts[len(data.parts) :] or parts[-1:]
        tasks.append(BigBench("_".join((FAMILY.name, *inside)), found[0], number, spec.seed, str(path)))
    if len(tasks) == 1:
        return Suite(tasks)
    return Suite(tasks, [Group(FAMILY.name, tuple(task.name for task in tasks), equal=True)])


FAMILY = Family(
    name="bigbench",
    summary="BIG-bench's JSON tasks: multiple choice by likelihood, or an exact match of what is written",
    build=build,
    data="a task.json, its folder, or a folder of such folders",
)
