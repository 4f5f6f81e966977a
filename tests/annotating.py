"""A server for raters, on small files of answers or on hostile ones, and requests to it as its page makes them."""

import json
import re
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import qlora
from eval.chatbot.annotate_desk import Desk
from eval.chatbot.annotate_items import comparisons
from eval.chatbot.annotate_server import AnnotationServer
from eval.chatbot.annotate_votes import Votes
from eval.chatbot.answers import read_answers
from eval.chatbot.questions import read_questions

SYSTEMS = ("xylo-7b", "quartz", "vertigo-13b")  # words that are in no text
QUESTIONS = ("Why is the sky blue?", "Name a colour.", "Add 2 and 3.", "Write a haiku.")


def files(folder: Path, systems: tuple[str, ...] = SYSTEMS, texts: dict[str, str] | None = None) -> list[Path]:
    """The questions, and the answers of each system; `texts` replaces those of some systems."""
    folder.mkdir(exist_ok=True)
    asked = [{"question_id": number, "text": text} for number, text in enumerate(QUESTIONS, 1)]
    paths = [write(folder / "questions.jsonl", asked)]
    for number, system in enumerate(systems):
        rows = []
        for question in asked:
            text = (texts or {}).get(system, f"Answer {number}{number} to: {question['text']}")
            rows.append({"question_id": question["question_id"], "answer_id": f"{system}-id", "text": text})
        paths.append(write(folder / f"{system}.jsonl", rows))
    return paths


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def desk(paths: list[Path], raters: int = 3, seed: int = 0, votes: str = "votes.sqlite") -> Desk:
    """What the command makes of its files."""
    items = comparisons(read_questions(paths[0]), [read_answers(path) for path in paths[1:]])
    store = Votes(paths[0].parent / votes)
    store.bind(items)
    return Desk(items, store, raters, seed)


class Serving:
    """A server in a thread."""

    def __init__(self, desk: Desk, port: int = 0) -> None:
        self.server = AnnotationServer(desk, port)
        self.address, self.desk = self.server.address, desk
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.desk.votes.close()


class Served:
    """`qlora annotate` in a process of its own, which can be killed."""

    def __init__(self, paths: list[Path], port: int = 0, *more: str) -> None:
        answers = [str(path) for path in paths[1:]]
        votes = paths[0].parent / "votes.sqlite"
        command = [sys.executable, "-m", "qlora", "annotate", *answers, "--questions", str(paths[0])]
        command += ["--votes", str(votes), "--port", str(port), "--json", *more]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=Path(qlora.__file__).parent, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        assert self.process.stderr is not None
        said = self.process.stderr.readline() + self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert found, said + self.process.stderr.read()
        self.address, self.port = found[0], int(found[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Rater:
    """Requests as the page makes them; every response is kept whole."""

    def __init__(self, address: str, name: str = "Ada") -> None:
        self.host, self.name = address.removeprefix("http://").rstrip("/"), name
        self.responses: list[str] = []
        page = self.request("GET", "/")[1]
        found = re.search('name="token" content="([^"]+)"', page)
        assert found
        self.token = found[1]

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        connection = HTTPConnection(self.host, timeout=20)
        try:
            given = {"Host": self.host} | {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            response = connection.getresponse()
            text = response.read().decode()
            self.responses.append(f"{response.status} {response.reason}\n{response.headers}\n{text}")
            return response.status, text
        finally:
            connection.close()

    def post(self, path: str, content: Any, **headers: str) -> tuple[int, Any]:
        own = {"Content_Type": "application/json", "Origin": f"http://{self.host}", "X_Token": self.token}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        status, text = self.request("POST", path, body, **(own | headers))
        return status, json.loads(text)

    def next(self) -> Any:
        status, state = self.post("/next", {"rater": self.name})
        assert status == 200, state
        return state

    def vote(self, item: str, score: int) -> Any:
        status, state = self.post("/vote", {"rater": self.name, "item": item, "score": score})
        assert status == 200, state
        return state

    def undo(self) -> tuple[int, Any]:
        return self.post("/undo", {"rater": self.name})
