"""What `mmlu` and its parts stand for, and their data: folders of published questions, or a file of ready prompts."""

from pathlib import Path

from eval.mmlu.protocols import PROTOCOLS, SHOTS, Protocol
from eval.mmlu.questions import SPLITS, read_prompts, read_questions
from eval.mmlu.subjects import GROUPS, NAMES, SUBJECTS, subjects_of
from eval.mmlu.task import Prompts, Questions, Subject, answer_lengths
from eval.task import Family, Group, Spec, Suite
from models.errors import ConfigError, DataError

LAYOUT = "a folder with dev, val and test/SUBJECT_SPLIT.csv, or a file of prompts in qlora.py's layout"


def build(spec: Spec) -> Suite:
    """The tasks of a name, in the order of the alphabet, and their groups."""
    if spec.name not in ("mmlu", *NAMES):
        raise ConfigError(f"task {spec.name!r} is no part of mmlu")
    if spec.examinee.architecture == "roberta":
        raise ConfigError(f"{spec.name} needs a model that writes, but this one is a RoBERTa")
    if spec.data is None:
        raise ConfigError(f"{spec.name} needs its data: {LAYOUT}")
    if not spec.data.exists():
        raise DataError(f"data: {spec.data} does not exist; {spec.name} needs {LAYOUT}")
    protocol = spec.protocol or ("qlora" if spec.data.is_file() else next(iter(PROTOCOLS)))
    tasks = (ready if spec.data.is_file() else published)(spec, spec.data, protocol)
    return Suite(tasks, groups(spec.name, PROTOCOLS[protocol]))


def published(spec: Spec, directory: Path, protocol: str) -> list[Subject]:
    """Tasks of the published files: the questions of a split below the first ones of dev."""
    split = spec.split or PROTOCOLS[protocol].split
    count = SHOTS if spec.num_fewshot is None else spec.num_fewshot
    if not 0 <= count <= SHOTS:
        raise ConfigError(f"num_fewshot is {count}; MMLU has {SHOTS} solved questions for each subject")
    if split == "dev" and count:
        raise ConfigError("the solved questions come from dev, so with split dev num_fewshot must be 0")
    if not (directory / split).is_dir():
        raise DataError(f"data: {directory} has no folder {split}; {spec.name} needs {LAYOUT}")

    subjects = subjects_of(spec.name)
    questions = read_questions(directory, split, subjects)
    shots = read_questions(directory, "dev", subjects) if count else {subject: [] for subject in subjects}
    few = [subject for subject in subjects if len(shots[subject]) < count]
    if few:
        raise DataError(
            f"data: {directory / 'dev'}/{few[0]}_dev.csv has {len(shots[few[0]])} questions, but {count} are to stand "
            "before each other one; give num_fewshot"
        )
    settings = {"dataset_path": str(directory), "test_split": split, "fewshot_split": "dev"}
    how = (protocol, settings, spec.window, answer_lengths(spec.examinee))
    return [Questions(subject, questions[subject], *how, shots=shots[subject][:count]) for subject in subjects]


def ready(spec: Spec, file: Path, protocol: str) -> list[Subject]:
    """Tasks of a file of prompts, which have everything in them."""
    if protocol != "qlora":
        raise ConfigError(f"{file} holds ready prompts, which are protocol qlora's; {protocol} writes its own")
    for name in ("split", "num_fewshot"):
        if getattr(spec, name) is not None:
            raise ConfigError(f"{file} holds ready prompts, which {name} cannot change; leave it out")
    subjects = subjects_of(spec.name)
    prompts = read_prompts(file, subjects)
    how = (protocol, {"dataset_path": str(file)}, spec.window, answer_lengths(spec.examinee))
    return [Prompts(subject, prompts[subject], *how) for subject in subjects]


def groups(name: str, protocol: Protocol) -> list[Group]:
    """The groups of a name; the last one has the mean that the protocol does not take, over questions or subjects."""
    subjects = subjects_of(name)
    if len(subjects) == 1:
        return []
    how = {"equal": protocol.macro, "version": protocol.version}
    members = tuple(f"mmlu_{subject}" for subject in subjects)
    if name == "mmlu":
        inner = [
            Group(f"mmlu_{part}", tuple(f"mmlu_{it}" for it, of in SUBJECTS.items() if of == part), alias, **how)
            for part, alias in GROUPS.items()
        ]
        top = Group("mmlu", tuple(group.name for group in inner), **how)
    else:
        inner, top = [], Group(name, members, GROUPS[name.removeprefix("mmlu_")], **how)
    other = Group(f"{name}_{'micro' if protocol.macro else 'macro'}", members, equal=not protocol.macro)
    return [top, *inner, other]


FAMILY = Family(
    name="mmlu",
    summary="questions from 57 subjects, four choices each, five solved ones before",
    build=build,
    names=NAMES,
    protocols=tuple(PROTOCOLS),
    splits=SPLITS,
    data=LAYOUT,
)
