"""`qlora judge A.jsonl B.jsonl ...`: a model compares chatbots' answers, as GPT-4 did for the paper.

Every pair is shown in both orders, since judges favour what they see first. The ratings are read by `qlora tournament`.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from eval.answering import BatchSize
from eval.chatbot.answers import named, read_systems, require_all
from eval.chatbot.asking import Judge, Prompt
from eval.chatbot.endpoint import Endpoint
from eval.chatbot.judging import PairFile, ordered_pairs
from eval.chatbot.local_judge import LocalJudge
from eval.chatbot.prompts import Mode, read_templates, shipped
from eval.chatbot.questions import Question, read_questions
from eval.chatbot.tally import print_table, tally
from eval.loading import load_examinee
from eval.progress import progress
from models import ConfigError
from models.target import LoadOptions

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Let a model compare chatbots' answers, each pair in both orders."""

    answers: Positional[tuple[str, ...]]
    """Files of answers, one for each system, which is named by its file or as in NAME=FILE."""
    questions: str
    """The questions that were answered."""
    judge: str
    """A model of the endpoint, such as gpt-4, or a checkpoint or a run here."""
    base_url: str | None = None
    """An OpenAI-compatible endpoint, such as http://localhost:8000/v1; by default OpenAI's, if no judge is here."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable with the endpoint's key; a server of your own may need none."""
    mode: Mode = "pairwise"
    """pairwise: which answer is better, or a tie. relative: two scores out of ten, against the reference."""
    reference: str | None = None
    """With mode relative, the system that all others are compared with."""
    out: str
    """The folder for the ratings, a file for each ordered pair; those that are there are kept."""
    prompts: str | None = None
    """A file of prompt templates; by default those that the paper used for such questions."""
    temperature: float = 0.2
    """As in the paper; 0 takes the most probable token."""
    max_tokens: int = 1024
    """Longest reply."""
    seed: int = 0
    """Decides the draws of a judge here."""
    concurrency: int = 8
    """Requests to an endpoint at a time."""
    timeout: float = 120.0
    """Seconds until a request is given up and tried again."""
    retries: int = 8
    """Further tries for a request that fails for a reason that may pass."""
    batch_size: BatchSize = "auto"
    """Prompts at a time for a judge here."""
    limit: int | None = None
    """Compare on so many questions only, from the first."""
    skip_missing: bool = False
    """Leave out questions that one of a pair has not answered, which are refused otherwise."""
    retry_unparsed: bool = False
    """Ask again where a reply decides nothing; earlier replies are kept in the row."""
    dry_run: bool = False
    """Count requests and tokens, and ask nothing."""
    load: LoadOptions = LoadOptions()
    """How a judge here is loaded."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if len(self.answers) < 2:
            raise ValueError(f"answers: {len(self.answers)} file(s) given; a comparison needs two or more")
        if (self.mode == "relative") != (self.reference is not None):
            raise ValueError("reference and mode relative go together; give both or neither")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        for name, least in (("max_tokens", 1), ("concurrency", 1), ("retries", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it must be above 0 seconds")

    @property
    def is_local(self) -> bool:
        return self.base_url is None and Path(self.judge).exists()


def command(options: JudgeOptions, console: "Console") -> dict[str, Any]:
    questions = read_questions(options.questions)[: options.limit]
    systems = read_systems(options.answers)
    if options.skip_missing:
        left_out = {id for answers in systems for id in answers.missing(questions)}
        console.print(f"{len(left_out)} questions lack an answer and are left out where they do")
    else:
        require_all(systems, questions)
    templates = read_templates(options.prompts or shipped(options.mode, questions))
    pairs = ordered_pairs(systems, named(systems, options.reference))
    judge = choose_judge(options)
    with ExitStack() as stack:
        files: list[PairFile] = []
        for first, second in pairs:
            files.append(
                PairFile(
                    first,
                    second,
                    questions,
                    directory=Path(options.out),
                    judge=judge.name,
                    mode=options.mode,
                    templates=templates,
                    settings=judge.settings,
                )
            )
            stack.callback(files[-1].close)
        requests = {
            file.key(question): (file, question) for file in files for question in file.missing(options.retry_unparsed)
        }
        prompts = {key: file.prompt(question) for key, (file, question) in requests.items()}
        if options.dry_run:
            return count(judge, prompts, files, options, console)
        usage, cut = ask(judge, prompts, requests, console)
        tallies = [tally(file) for file in files]
    print_table(tallies, console)
    unparsed = sum(it.unparsed for it in tallies)
    if unparsed:
        console.print(f"{unparsed} replies decide nothing; --retry-unparsed asks for them again")
    if cut:
        console.print(f"[yellow]{cut} prompts were longer than the judge takes and lost their beginning[/yellow]")
    console.print(f"{len(prompts)} requests; {len(tallies)} files of ratings in {options.out}", markup=False)
    return {
        "judge": judge.name,
        "mode": options.mode,
        "out": options.out,
        "requests": len(prompts),
        "unparsed": unparsed,
        "cut": cut,
        "usage": usage,
        "pairs": [asdict(it) for it in tallies],
    }


def ask(
    judge: Judge,
    prompts: Mapping[str, Prompt],
    requests: Mapping[str, tuple[PairFile, Question]],
    console: "Console",
) -> tuple[dict[str, int], int]:
    """Keep every reply as it comes; what they used in tokens comes back, and how many prompts were cut."""
    usage: dict[str, int] = {}
    cut = 0
    with progress(console, "judging") as show:
        show(0, len(prompts))
        for done, (key, reply) in enumerate(judge.replies(prompts), 1):
            file, question = requests[key]
            file.keep(question, reply)
            cut += "cut" in reply.details
            for name, tokens in reply.details.get("usage", {}).items():
                usage[name] = usage.get(name, 0) + tokens
            show(done, len(prompts))
    return usage, cut


def count(
    judge: Judge, prompts: Mapping[str, Prompt], files: Sequence[PairFile], options: JudgeOptions, console: "Console"
) -> dict[str, Any]:
    """What there would be to ask."""
    rated = sum(1 for file in files for _ in file.rated())
    tokens = sum(judge.tokens(prompt) for prompt in prompts.values())
    most = len(prompts) * options.max_tokens
    about = "" if options.is_local else "about "
    console.print(
        f"{len(prompts)} requests for {len(files)} ordered pairs ({rated} ratings are there): {about}{tokens} tokens "
        f"of prompts, and at most {most} of replies"
    )
    return {
        "judge": judge.name,
        "mode": options.mode,
        "requests": len(prompts),
        "rated": rated,
        "prompt_tokens": tokens,
        "completion_tokens_at_most": most,
        "dry_run": True,
    }


def choose_judge(options: JudgeOptions) -> Judge:
    """A model here, if the judge is a path that exists, else one of an endpoint."""
    shared: dict[str, Any] = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    if options.is_local:
        examinee = load_examinee(options.judge, options.load, chat=True)
        name = Path(options.judge).absolute().name
        return LocalJudge(name, examinee, seed=options.seed, batch_size=options.batch_size, **shared)
    key = os.environ.get(options.api_key_env)
    if options.base_url is None and os.sep in options.judge:
        raise ConfigError(f"judge: there is no {options.judge} here; a model of an endpoint needs --base-url")
    if options.base_url is None and not key and not options.dry_run:
        raise ConfigError(
            f"judge: there is no {options.judge} here, and for OpenAI's endpoint the environment variable "
            f"{options.api_key_env} must hold a key; another endpoint is given by --base-url"
        )
    return Endpoint(
        options.judge,
        options.base_url,
        key,
        concurrency=options.concurrency,
        timeout=options.timeout,
        retries=options.retries,
        **shared,
    )
