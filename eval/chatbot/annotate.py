"""`qlora annotate A.jsonl B.jsonl --questions Q.jsonl --votes FILE`: people say which of two answers is better.

A small web page on this machine shows a question and two answers, without saying whose they are; raters vote A, B or
tie. The paper had three raters for each pair of systems, and two where ChatGPT was the reference.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from eval.chatbot.annotate_desk import Desk
from eval.chatbot.annotate_export import export
from eval.chatbot.annotate_items import comparisons
from eval.chatbot.annotate_server import AnnotationServer
from eval.chatbot.annotate_votes import Votes
from eval.chatbot.answers import named, read_systems
from eval.chatbot.questions import read_questions
from models import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

PAIRWISE, REFERENCED = 3, 2  # raters in the paper


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions:
    """Serve a web page on which people compare systems' answers."""

    answers: Positional[tuple[str, ...]] = ()
    """Files of answers, one for each system, which is named by its file or as in NAME=FILE."""
    questions: str
    """The file of questions."""
    votes: str
    """The SQLite file of votes; a new one is made, an old one is gone on with."""
    reference: str | None = None
    """Compare every other system with this one only, not each with each."""
    raters: int | None = None
    """Raters for each comparison; by default 3, and 2 with a reference, as in the paper."""
    port: int = 8377
    """Of the page on this machine; 0 takes any that is free."""
    seed: int = 0
    """Draws the sides of answers and the order of comparisons, for each rater."""
    export: str | None = None
    """Write the votes to this directory, in the layout of the released human ratings, and serve no page."""
    json: bool = False
    """Print one JSON object on stdout at the end."""

    def __post_init__(self) -> None:
        if self.raters is not None and self.raters < 1:
            raise ValueError(f"raters is {self.raters}; it must be at least 1")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; it must be 0 to 65535")


def command(options: AnnotateOptions, console: "Console") -> dict[str, Any]:
    questions = read_questions(options.questions)
    if options.export is not None:
        return export_command(options, console)
    systems = read_systems(options.answers)
    reference = named(systems, options.reference)
    items = comparisons(questions, systems, None if reference is None else reference.system)
    for answers in systems:
        lacking = answers.missing(questions)
        if lacking:
            console.print(
                f"{answers.path} has no answer to {len(lacking)} of {len(questions)} questions; raters do not see them",
                markup=False,
                soft_wrap=True,
            )
    raters = options.raters or (PAIRWISE if reference is None else REFERENCED)
    votes = Votes(Path(options.votes))
    try:
        votes.bind(items)
        desk = Desk(items, votes, raters, options.seed)
        server = AnnotationServer(desk, options.port, lambda text: console.print(text, markup=False, soft_wrap=True))
        with server:
            console.print(
                f"{said(desk, raters)}\nRaters go to {server.address} (Ctrl-C ends)", markup=False, soft_wrap=True
            )
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                console.print(f"\n{said(desk, raters)}", markup=False, soft_wrap=True)
        return {"votes_file": options.votes, "raters_each": raters, **desk.summary()}
    finally:
        votes.close()


def said(desk: Desk, raters: int) -> str:
    """One line on how far the raters are."""
    it = desk.summary()
    by = f" by {', '.join(f'{name} ({count})' for name, count in it['raters'].items())}" if it["raters"] else ""
    each = f"{raters} raters" if raters > 1 else "rater"
    return f"{it['complete']} of {it['comparisons']} comparisons have their {each}; {it['votes']} votes{by}"


def export_command(options: AnnotateOptions, console: "Console") -> dict[str, Any]:
    if not Path(options.votes).is_file():
        raise ConfigError(f"{options.votes}: there is no such file of votes")
    assert options.export is not None
    votes = Votes(Path(options.votes))
    try:
        cast = votes.all()
    finally:
        votes.close()
    if not cast:
        raise DataError(f"{options.votes}: has no votes yet")
    paths = export(cast, read_questions(options.questions), Path(options.export))
    console.print(f"{len(cast)} votes in {len(paths)} files in {options.export}", markup=False, soft_wrap=True)
    return {"votes": len(cast), "files": [str(path) for path in paths]}
