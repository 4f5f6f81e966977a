"""`qlora generate`: a model's text after one prompt, on the terminal, or its answers to a file of questions.

Answers are sampled as the paper sampled its models; what there is of them in the file is kept, so a command that was
killed goes on where it was. Of several processes each answers a part, and the main one writes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from eval.answering import BatchSize
from eval.chatbot.answers import row_id, system_name
from eval.chatbot.journal import Journal
from eval.chatbot.questions import read_questions
from eval.chatbot.sampled import Settings, write_answers
from eval.loading import load_examinee
from eval.progress import progress
from models import ConfigError, Sampling
from models.llama import causal
from models.parallel import world
from models.parallel.launch import Processes
from models.parallel.turns import Turns
from models.parallel.watch import TIMEOUT
from models.target import LoadOptions
from models.writing import answer, say

if TYPE_CHECKING:
    from rich.console import Console

NUCLEUS = Sampling(temperature=0.7, top_p=0.9)  # as the paper's models answered both benchmarks


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen; with --questions from a nucleus of 0.9 at temperature 0.7, unless said here."""

    temperature: float | None = None
    """0 takes the most probable token, which is the default; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample among the k most probable only; 0 for all, which is the default."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities reach p (nucleus sampling); by default 1, for all."""
    repetition_penalty: float | None = None
    """Divide the logit of a token that is already there (multiply, where negative); by default 1."""

    def __post_init__(self) -> None:
        self.over(Sampling())

    def over(self, default: Sampling) -> Sampling:
        """These settings, and the default's where none are given."""
        return replace(default, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Write on from a prompt (a T5 reads it and writes another text), or answer a file of questions."""

    target: Positional[str]
    """A checkpoint or a run."""
    prompt: str | None = None
    """The text to go on from, or for a T5 to read; with --chat, a user's message."""
    questions: str | None = None
    """Answer these instead: a JSON object a line, with question_id or message_id and text, or a chat as messages."""
    out: str | None = None
    """The file of answers; one that holds a part of them is completed."""
    chat: bool = False
    """Use the model's chat form; without it, questions go in the form of the paper's released prompts."""
    max_new_tokens: int | None = None
    """Where to stop if the model does not; by default 128, or 1024 for questions."""
    sampling: SamplingOptions = SamplingOptions()
    """How tokens are chosen."""
    num_beams: int = 1
    """Texts kept at every step in search of the most probable one; 1 for no search."""
    length_penalty: float = 1.0
    """Beam search ranks texts by the sum of their log-probabilities over length^length_penalty."""
    seed: int | None = None
    """Makes sampling repeatable; for questions it is 0 unless given."""
    limit: int | None = None
    """Answer so many questions only, from the first."""
    batch_size: BatchSize = "auto"
    """Questions at a time; auto takes what suits the device, and halves it when memory runs out."""
    load: LoadOptions = LoadOptions()
    """How the model is loaded."""
    nproc: int = 1
    """Work on so many processes of this machine, a GPU each."""
    timeout: float = TIMEOUT
    """Seconds that a process waits for the others before it gives up."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.questions is None):
            raise ValueError("give either a prompt or a file of questions")
        if self.questions is not None and self.out is None:
            raise ValueError("out is not given; name the file for the answers")
        if self.questions is not None and self.num_beams != 1:
            raise ValueError(f"num_beams is {self.num_beams}; questions are answered without a search")
        if self.questions is None and (self.out is not None or self.limit is not None):
            raise ValueError("out and limit go with questions, not with a prompt")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @property
    def processes(self) -> Processes:
        return Processes(self.nproc, self.load.device, self.timeout)


def command(options: GenerateOptions, console: "Console") -> dict[str, Any]:
    return write_on(options, console) if options.questions is None else answer_questions(options, console)


def write_on(options: GenerateOptions, console: "Console") -> dict[str, Any]:
    """The text after one prompt, shown as it comes."""
    assert options.prompt is not None
    examinee = load_examinee(options.target, options.load, options.chat)
    if options.chat:
        causal(examinee.model, "chat")
    ids = examinee.prompted(options.prompt)
    if not ids:
        raise ConfigError("generate: the prompt is empty, and this tokenizer has no id to begin a text with")
    beams = {"num_beams": options.num_beams, "length_penalty": options.length_penalty}
    room = 128 if options.max_new_tokens is None else options.max_new_tokens
    with Turns(examinee.model) as turns:  # one text is written by one process, of a shared model too
        text = ""
        if world.is_main():
            sampling = options.sampling.over(Sampling())
            parts = answer(examinee.model, examinee.tokenizer, ids, room, sampling, options.seed, **beams)
            text = say(parts, console)
        text, *_ = turns.gathered(text)
    return {"target": options.target, "prompt": options.prompt, "text": text}


def answer_questions(options: GenerateOptions, console: "Console") -> dict[str, Any]:
    """A row for each question in a file, those that are there already left as they are."""
    assert options.questions is not None
    assert options.out is not None
    path = Path(options.out)
    questions = read_questions(options.questions)[: options.limit]
    examinee = load_examinee(options.target, options.load, options.chat)
    if options.chat:
        causal(examinee.model, "chat")
    settings = Settings(
        system=system_name(path),
        max_new_tokens=1024 if options.max_new_tokens is None else options.max_new_tokens,
        sampling=options.sampling.over(NUCLEUS),
        seed=options.seed or 0,
        identity=examinee.identity[:16],
        chat=options.chat,
    )
    requests = {question.id: settings.request(examinee, question) for question in questions}
    journal = Journal(path, key=row_id) if world.is_main() else None
    try:
        if journal is not None:
            journal.refuse_others(settings.record)
        there = world.from_main(set() if journal is None else set(journal.rows))
        missing = [question for question in questions if question.id not in there]
        with progress(console, "answering") as show:
            write_answers(examinee, missing, requests, settings, options.batch_size, journal, show)
        if journal is not None:
            journal.finish(question.id for question in questions)
    finally:
        if journal is not None:
            journal.close()
    cut = sum(request.cut > 0 for request in requests.values())
    if cut:
        console.print(f"{cut} questions were longer than the model takes and lost their beginning")
    console.print(f"{len(missing)} questions answered, {len(questions)} answers in {path}", markup=False)
    return {
        "target": options.target,
        "questions": options.questions,
        "out": options.out,
        "answers": len(questions),
        "answered": len(missing),
        "cut": cut,
        **settings.record,
    }
