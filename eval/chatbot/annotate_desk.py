"""What a rater is given next, and what becomes of a vote.

Comparisons with the fewest votes come first, so that all have one before any has two; among these, first come those
that no other rater has open, then the order is drawn for each rater. What is open is only a hint, kept in memory:
the number of votes on a comparison is checked when one is cast.
"""

from collections.abc import Sequence
from http import HTTPStatus
from threading import Lock
from typing import Any
from unicodedata import normalize

from eval.chatbot.annotate_items import Comparison, Key, draw
from eval.chatbot.annotate_votes import Vote, Votes

LONGEST_NAME = 60  # characters

Reply = dict[str, Any]


class Rejected(Exception):
    """What a page asked for cannot be done; the text is for the rater."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Desk:
    """Comparisons, the votes on them, and who has what before them."""

    def __init__(self, comparisons: Sequence[Comparison], votes: Votes, raters: int, seed: int = 0) -> None:
        self.by_key = {it.key: it for it in comparisons}
        self.votes, self.raters, self.seed = votes, raters, seed
        self.open: dict[str, Key] = {}  # by rater
        self.lock = Lock()

    def next(self, name: str) -> Reply:
        """What a rater sees now: the same again until there is a vote on it."""
        with self.lock:
            return self.reply(rater_of(name))

    def vote(self, name: str, token: str, score: int) -> Reply:
        """Keep a vote, and give what comes next."""
        rater = rater_of(name)
        if score not in (1, 2, 3):
            raise Rejected(HTTPStatus.BAD_REQUEST, "A vote is 1, 2 or 3.")
        with self.lock:
            outcome = self.votes.cast(self.find(rater, token), score, rater, self.raters)
            self.open.pop(rater, None)
            notes = {
                "kept": "",
                "voted before": "You had voted on that one already; your first vote stands.",
                "full": "Others have rated that one meanwhile, and your vote was not needed.",
            }
            return self.reply(rater, notes[outcome])

    def undo(self, name: str) -> Reply:
        """Take back the rater's last vote, and show again what it was on."""
        rater = rater_of(name)
        with self.lock:
            mine = self.mine(rater)
            if not mine:
                raise Rejected(HTTPStatus.CONFLICT, "There is no vote to take back.")
            self.votes.withdraw(mine[-1])
            self.open[rater] = mine[-1].key
            return self.reply(rater)

    def reply(self, rater: str, note: str = "") -> Reply:
        """Progress, and the comparison before the rater if one is left."""
        done, counts = {vote.key for vote in self.mine(rater)}, self.votes.counts()
        left = [key for key in self.by_key if key not in done and counts.get(key, 0) < self.raters]
        progress = {"done": len(done), "total": len(done) + len(left), "note": note}
        if not left:
            return {**progress, "item": None}
        if self.open.get(rater) not in left:
            others = set(self.open.values())
            self.open[rater] = min(
                left, key=lambda key: (counts.get(key, 0), key in others, draw(self.seed, "order", rater, *key))
            )
        shown = self.by_key[self.open[rater]].shown(rater, self.seed)
        turns = [{"role": it["role"], "text": it["content"]} for it in shown.question.messages]
        a, b = shown.answers
        return {**progress, "item": shown.token(rater, self.votes.secret), "question": turns, "a": a, "b": b}

    def mine(self, rater: str) -> list[Vote]:
        """A rater's votes on what is compared here."""
        return [vote for vote in self.votes.of(rater) if vote.key in self.by_key]

    def find(self, rater: str, token: str) -> Comparison:
        """What was shown under a token; the sides may come from a server that ran with another seed."""
        for comparison in self.by_key.values():
            for shown in (comparison, comparison.flipped):
                if shown.token(rater, self.votes.secret) == token:
                    return shown
        raise Rejected(HTTPStatus.NOT_FOUND, "This comparison is no longer here; reload the page.")

    def summary(self) -> dict[str, Any]:
        """How far the raters are."""
        with self.lock:
            votes = [vote for vote in self.votes.all() if vote.key in self.by_key]
            counts = self.votes.counts()
        by_rater: dict[str, int] = {}
        for vote in votes:
            by_rater[vote.rater] = by_rater.get(vote.rater, 0) + 1
        complete = sum(counts.get(key, 0) >= self.raters for key in self.by_key)
        return {"comparisons": len(self.by_key), "complete": complete, "votes": len(votes), "raters": by_rater}


def rater_of(name: str) -> str:
    """A rater's name as votes have it: capitals and spaces do not make another person.

    >>> rater_of("  Ada   Lovelace ")
    'ada lovelace'
    """
    rater = " ".join(normalize("NFKC", name).casefold().split())
    if not rater or len(rater) > LONGEST_NAME or not rater.isprintable():
        raise Rejected(HTTPStatus.BAD_REQUEST, f"A name has 1 to {LONGEST_NAME} letters.")
    return rater
