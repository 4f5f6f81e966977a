"""The command line: one verb a line, each handed to the package that does it."""

import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Verb:
    """Where a verb's options and its function are, and what it does in one line."""

    module: str
    options: str
    function: str
    summary: str


VERBS = {
    "demo": Verb("train.demo", "DemoOptions", "command", "the main job on a real model and real data"),
    "doctor": Verb("train.doctor", "DoctorOptions", "command", "what this machine has, with a self-test"),
    "quantize": Verb("train.quantize", "QuantizeOptions", "command", "raw checkpoint to NF4 safetensors"),
    "inspect": Verb("models.inspection", "InspectOptions", "command", "what a checkpoint, an adapter or a run is"),
    "data": Verb("train.data.check", "DataOptions", "command", "check or preview a data file as training sees it"),
    "estimate": Verb("train.planner.command", "EstimateOptions", "command", "memory plan: every byte, and what fits"),
    "train": Verb("train.finetune", "TrainOptions", "command", "fine-tune adapters on a quantized base"),
    "resume": Verb("train.resume", "ResumeOptions", "command", "go on with a run that was killed or interrupted"),
    "export": Verb("models.export", "ExportOptions", "command", "adapter, 4-bit checkpoint or GGUF for other tools"),
    "generate": Verb("eval.generate", "GenerateOptions", "command", "write on from a prompt, or answer questions"),
    "chat": Verb("models.writing", "ChatOptions", "chat_command", "talk with a model or a run"),
    "eval": Verb("eval.command", "EvalOptions", "command", "measure a model or a run on a task"),
    "judge": Verb("eval.chatbot.judge", "JudgeOptions", "command", "let a model compare chatbots' answers"),
    "annotate": Verb(
        "eval.chatbot.annotate", "AnnotateOptions", "command", "a web page on which people compare answers"
    ),
    "merge": Verb("models.merge", "MergeOptions", "command", "base and adapter to one 16-bit checkpoint"),
    "tournament": Verb(
        "eval.chatbot.tournament", "TournamentOptions", "command", "ratings of chatbots: Elo, percent, agreement"
    ),
    "bench": Verb("benchmarks.command", "BenchOptions", "command", "speed and memory, beside others' and targets"),
    "sweep": Verb(
        "train.sweep.command", "SweepOptions", "command", "a grid of runs, resumable, with a table and plots"
    ),
    "list": Verb("train.listing", "ListOptions", "command", "presets, tasks and formats that can be named"),
    "plot": Verb("train.plot", "PlotOptions", "command", "loss and learning-rate plots of runs"),
}

HARMLESS = {"doctor", "list"}
"""Verbs of one process that may be started as several: only the first prints."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code says how it went (see README)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] not in VERBS:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"qlora: no verb {arguments[0]!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return run(arguments[0], arguments[1:])


def run(name: str, arguments: list[str]) -> int:
    from models.parallel.failure import end_if_broken, watched

    try:
        with watched(partial(tell, name, "--json" in arguments)):
            return work(name, arguments)
    except BaseException as error:
        code = exit_code(error)
        end_if_broken(error, code)
        if code is None:
            raise
        return code


def work(name: str, arguments: list[str]) -> int:
    """Do what a verb does, in this process or in several."""
    from rich.console import Console

    from models.parallel import launch
    from train.config import parse

    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    with launch.quiet():
        options = parse(getattr(module, verb.options), arguments, prog=f"qlora {name}", description=verb.summary)
    asked = getattr(options, "processes", None)
    if (count := launch.to_start(asked)) > 1:
        return launch.launch([sys.executable, __file__, name, *arguments], count)
    with launch.joined(name, asked, harmless=name in HARMLESS):
        console = Console(stderr=options.json, highlight=False, quiet=not launch.speaks())
        result = getattr(module, verb.function)(options, console)
    if options.json and launch.speaks():
        print(json.dumps(result))
    return 0


def exit_code(error: BaseException) -> int | None:
    """What scripts are told of an error; None for a mistake of ours, or an exit with a code of its own."""
    from models.device import is_out_of_memory
    from models.errors import Refusal

    if isinstance(error, Refusal):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 5 if is_out_of_memory(error) else None


def tell(name: str, as_json: bool, error: BaseException) -> None:
    """Say why a verb has failed; a mistake of ours shows itself, with its traceback."""
    from models.device import is_out_of_memory
    from models.errors import Refusal

    if isinstance(error, Refusal):
        print(f"qlora {name}: {error}", file=sys.stderr)
        if error.report is not None and as_json:
            print(json.dumps(error.report))
    elif is_out_of_memory(error):
        print(f"qlora {name}: out of memory: {(str(error) or 'none is left').splitlines()[0]}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"qlora {name}: {note}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print(f"qlora {name}: interrupted", file=sys.stderr)


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(["usage: qlora VERB [options]; `qlora VERB --help` says more", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
