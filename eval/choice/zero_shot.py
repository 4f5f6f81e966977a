"""Winogrande, HellaSwag, PIQA, ARC-Easy and ARC-Challenge, and their mean: the paper's Figure 3.

Prompts, versions and metrics are those of the lm-evaluation-harness. The figure shows "mean zero-shot accuracy": that
is `acc`, the only metric that all five report; the group's `acc` is its plain mean. Each set is scored on the split
that the harness scores: ARC on its test split, the others on validation, since their test answers are not published.
Examples, if any are wanted, are the first of the training split; where there is no training file they are the first
records of the scored file, which are then not scored. (The harness draws others for every document.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eval.choice import published
from eval.choice.reading import documents, place
from eval.choice.task import Choice, few, first, set_apart
from eval.task import Document, Family, Group, Spec, Suite
from models import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """How a data set is published."""

    convert: Callable[[Document], Document]
    files: Mapping[str, tuple[str, ...]]
    """The names that the file of a split has; the first one that is there counts."""
    folders: tuple[str, ...]
    """What its archives unpack to."""
    split: str = "validation"
    """The one that is scored unless another is asked for."""
    metrics: tuple[str, ...] = ("acc", "acc_norm")


def arc_files(name: str) -> dict[str, tuple[str, ...]]:
    return {
        "test": (f"{name}-Test.jsonl", "test.jsonl"),
        "validation": (f"{name}-Dev.jsonl", "validation.jsonl"),
        "train": (f"{name}-Train.jsonl", "train.jsonl"),
    }


SETS = {
    "winogrande": DataSet(
        convert=published.winogrande,
        files={
            "validation": ("dev.jsonl", "validation.jsonl"),
            "train": (
                "train_xl.jsonl",
                "train_l.jsonl",
                "train_m.jsonl",
                "train_s.jsonl",
                "train_xs.jsonl",
                "train.jsonl",
            ),
            "test": ("test.jsonl",),
        },
        folders=("winogrande_1.1",),
        metrics=("acc",),
    ),
    "hellaswag": DataSet(
        convert=published.hellaswag,
        files={
            "validation": ("hellaswag_val.jsonl", "validation.jsonl"),
            "train": ("hellaswag_train.jsonl", "train.jsonl"),
            "test": ("hellaswag_test.jsonl", "test.jsonl"),
        },
        folders=("hellaswag/data",),
    ),
    "piqa": DataSet(
        convert=published.piqa,
        files={
            "validation": ("valid.jsonl", "dev.jsonl", "validation.jsonl"),
            "train": ("train.jsonl",),
            "test": ("tests.jsonl", "test.jsonl"),
        },
        folders=("physicaliqa-train-dev",),
    ),
    "arc_easy": DataSet(
        convert=published.arc,
        files=arc_files("ARC-Easy"),
        folders=("ARC-Easy", "ARC-V1-Feb2018-2/ARC-Easy", "ARC-V1-Feb2018/ARC-Easy"),
        split="test",
    ),
    "arc_challenge": DataSet(
        convert=published.arc,
        files=arc_files("ARC-Challenge"),
        folders=("ARC-Challenge", "ARC-V1-Feb2018-2/ARC-Challenge", "ARC-V1-Feb2018/ARC-Challenge"),
        split="test",
    ),
}
USUAL = "harness"  # the split's name that stands for each set's own


def build(spec: Spec) -> Suite:
    """The set that is named, or all five with their mean."""
    data = place(spec, FAMILY.data)
    if spec.name in SETS:
        return Suite([choice_task(spec.name, data, spec)])
    if not data.is_dir():
        raise ConfigError(f"{spec.name} needs a folder with all of {', '.join(SETS)}, but {data} is a file")
    tasks = [choice_task(name, data, spec) for name in SETS]
    return Suite(tasks, [Group(FAMILY.name, tuple(SETS), equal=True)])


def choice_task(name: str, data: Path, spec: Spec) -> Choice:
    """One set's task, from a folder with its files or from one of them."""
    published_as, number = SETS[name], few(spec.num_fewshot)
    asked = None if spec.split == USUAL else spec.split
    if data.is_dir():
        split = asked or published_as.split
        path = find(data, name, split)
        if path is None:
            raise DataError(
                f"data: {data} has no file of {name}'s {split} split ({' or '.join(published_as.files[split])}), "
                f"nor has its folder {' or '.join((name, *published_as.folders))}"
            )
    elif asked:
        raise ConfigError(f"split is {asked}, but {data} is a file; a split is chosen from a folder")
    else:
        split, path = data.name, data
    scored, examples, source = read(path, published_as), [], None
    if number:
        source = find(path.parent if data.is_file() else data, name, "train")
        if source is None or source == path:
            source = path
            examples, scored = set_apart(scored, number, str(path))
        else:
            examples = first(read(source, published_as), number, str(source))
    return Choice(
        name,
        scored,
        examples,
        metrics=published_as.metrics,
        settings={"data": str(path), "split": split, "fewshot_data": source and str(source)},
    )


def find(folder: Path, name: str, split: str) -> Path | None:
    """A set's file of a split, in a sub-folder of its own or in the folder itself."""
    published_as = SETS[name]
    places = [folder / name, *(folder / part for part in published_as.folders), folder]
    paths = [path / file for path in places for file in published_as.files[split]]
    return next((path for path in paths if path.is_file()), None)


def read(path: Path, published_as: DataSet) -> list[Document]:
    """The documents of a file, whose labels may be in a file beside it: valid.jsonl and valid-labels.lst."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if not labels_path.is_file():
        return documents(path, published_as.convert)
    try:
        labels = [line.strip() for line in labels_path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"data: {labels_path}: byte {error.start} is not UTF-8") from error
    left = iter(labels)

    def labelled(record: Document) -> Document:
        label = next(left, None)
        return published_as.convert({"label": label, "answer": label, **record})

    found = documents(path, labelled)
    if len(found) != len(labels):
        raise DataError(f"data: {labels_path} has {len(labels)} labels, but {path} has {len(found)} records")
    return found


FAMILY = Family(
    name="zero_shot",
    summary="Winogrande, HellaSwag, PIQA, ARC-Easy, ARC-Challenge and their mean (the paper's Figure 3)",
    build=build,
    names=tuple(SETS),
    splits=(USUAL, "validation", "test", "train"),
    data="the published files (dev.jsonl, hellaswag_val.jsonl, valid.jsonl with valid-labels.lst, ARC-Easy-Test.jsonl, "
    "ARC-Challenge-Test.jsonl), for all five in sub-folders winogrande, hellaswag, piqa, arc_easy, arc_challenge",
)
