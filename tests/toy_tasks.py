"""A family of tasks small enough to count by hand: which word follows, and what is written."""

from eval.generation import generation
from eval.likelihood import likelihood
from eval.statistics import MEAN
from eval.task import Family, Group, Suite, Task


class Toy(Task):
    """Two choices after each context; the first is right."""

    output_type = "multiple_choice"
    metrics = {"acc": MEAN}
    settings = {"dataset_path": "toy"}
    contexts: tuple[str, ...]

    def __init__(self, name, contexts, writes=False):
        self.name, self.alias, self.writes = name, name.removeprefix("toy_"), writes
        self.documents = [{"context": context} for context in contexts]

    def requests(self, document, examinee):
        if self.writes:
            return [generation(examinee, document["context"], 5)]
        return [likelihood(examinee, document["context"], choice) for choice in (" red", " blue")]

    def score(self, document, answers):
        if self.writes:
            return {"acc": float(len(answers[0]) % 2)}
        return {"acc": float(answers[0][0] > answers[1][0])}

    def target(self, document):
        return " red"


def build(spec):
    names = ("toy_a", "toy_b") if spec.name == "toy" else (spec.name,)
    contexts = {"toy_a": ("It is", "A", "The small"), "toy_b": ("Name colour",) * 4 + ("and so",), "toy_write": ("It",)}
    tasks = [Toy(name, contexts[name], name == "toy_write") for name in names]
    groups = [Group("toy", names), Group("toy_macro", names, equal=True)] if spec.name == "toy" else []
    return Suite(tasks, groups)


FAMILY = Family(name="toy", summary="a toy", build=build, names=("toy_a", "toy_b", "toy_write"), protocols=("x", "y"))
