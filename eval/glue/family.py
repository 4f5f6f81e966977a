"""GLUE by name: `glue` as it suits the model, `glue-finetune` and `glue-prompt` by protocol, and each task alone.

    qlora eval runs/rte --task glue --data glue_data                 the task that the run was fine-tuned for
    qlora eval runs/mnli --task glue --data glue_data --split test   predictions for the leaderboard
    qlora eval llama --task glue --data glue_data --num-fewshot 5    all tasks that are there, as prompts

"GLUE" in the lm-evaluation-harness is prompts; GLUE in the papers on RoBERTa is fine-tuning. The numbers are not to be
compared, so results say which one they are of.
"""

import logging

from eval.glue.documents import MNLI, PARTS, Documents, documents, needed
from eval.glue.finetuned import Labelled, Written, trained_for
from eval.glue.prompted import PROMPTS, Prompted
from eval.glue.task import GluePart
from eval.task import Family, Spec, Suite
from models import ConfigError, DataError

FINETUNE, PROMPT = "finetune", "prompt"


def build(spec: Spec) -> Suite:
    """The tasks that a name stands for, with their data read."""
    if spec.data is None:
        raise ConfigError(f"{spec.name} needs --data: {FAMILY.data}")
    protocol, split = protocol_of(spec), spec.split or "dev"
    if protocol == FINETUNE and spec.num_fewshot:
        raise ConfigError(f"{spec.name}: examples before a question (num_fewshot) are for protocol prompt")
    if spec.name in PARTS:
        if protocol == PROMPT and spec.name not in PROMPTS:
            raise ConfigError(
                f"{spec.name} has no prompt: its label is a score, not one of a few words, and the harness has no such "
                "task; give a model that was fine-tuned for it and --protocol finetune"
            )
        chosen = [needed(PARTS[spec.name], spec.data, split)]
    else:
        chosen = all_of(spec, protocol, split)
    return Suite([task(spec, protocol, found) for found in chosen])


def protocol_of(spec: Spec) -> str:
    """Fine-tuning for what labels texts and prompts for what writes them, unless one is named."""
    named = spec.name.removeprefix("glue-") if spec.name.startswith("glue-") else None
    if named is not None and spec.protocol not in (None, named):
        raise ConfigError(f"task {spec.name} is the protocol {named}, but protocol {spec.protocol} is given; drop one")
    labels = spec.examinee.architecture == "roberta"
    protocol = named or spec.protocol or (FINETUNE if labels else PROMPT)
    if protocol == PROMPT and labels:
        raise ConfigError(f"{spec.name}: a RoBERTa writes no answer to a prompt; fine-tune it, and drop the protocol")
    return protocol


def all_of(spec: Spec, protocol: str, split: str) -> list[Documents]:
    """The parts that a model can be asked and that have data; which are left out is said."""
    assert spec.data is not None
    parts = [part for part in PARTS.values() if split in part.files]
    if spec.examinee.architecture == "roberta":
        only = trained_for(spec.examinee)
        parts = [part for part in parts if part.task == only]
    found = {part.name: documents(part, spec.data, split, named=False) for part in parts}
    there = {name: it for name, it in found.items() if it is not None}
    missing = [name for name in found if name not in there]
    if not there:
        raise DataError(f"data: {spec.data} has no {split} split of {' or '.join(missing)}; it is {FAMILY.data}")
    log = logging.getLogger(__name__)
    if missing:
        log.warning("glue: %s has no %s split of %s; left out", spec.data, split, ", ".join(missing))
    if protocol == PROMPT and there.pop("stsb", None) is not None:
        log.warning("glue: stsb has no prompt, since its label is a score and no word; left out")
    return list(there.values())


def task(spec: Spec, protocol: str, found: Documents) -> GluePart:
    """A part as the protocol asks for it."""
    if protocol == FINETUNE:
        return (
            Labelled(found, spec.examinee, spec.window) if spec.examinee.architecture == "roberta" else Written(found)
        )
    if not spec.num_fewshot:
        return Prompted(found)
    assert spec.data is not None
    train = PARTS["mnli"] if found.part.task is MNLI else found.part
    return Prompted(found, needed(train, spec.data, "train"), spec.num_fewshot, spec.seed)


FAMILY = Family(
    name="glue",
    summary="GLUE's nine tasks: fine-tuned (RoBERTa, T5) or as the harness's prompts (LLaMA, T5)",
    build=build,
    names=("glue-finetune", "glue-prompt", *PARTS),
    protocols=(FINETUNE, PROMPT),
    splits=("dev", "train", "test"),
    data="a folder with GLUE's official TSV files, in a folder for each task: CoLA, SST-2, MRPC, STS-B, QQP, MNLI, ...",
)
