"""A judge behind an OpenAI-compatible endpoint: many requests at once, each asked again until it is answered.

What may pass is waited out: rate limits (as long as the server says), time-outs, faults of the server and replies that
are none. What will not pass, such as a wrong key or an unknown model, ends the run with the server's own words. Replies
to requests that are on their way when a run ends are still taken: they were paid for.
"""

import importlib.util
import json
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any

from eval.chatbot.asking import Prompt, Reply
from models import ConfigError
from models.errors import Refusal, ServiceError

PASSING = {408, 409, 425, 429}  # of the statuses below 500, those that are worth another try
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is left alone
LIMITS = ("max_tokens", "max_completion_tokens")  # the field's name for most servers, and for some of OpenAI's models
BACKOFF = (1.0, 60.0)  # seconds before the second try, doubled each time up to the other


class Fault(Exception):
    """What may pass."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after
        """Seconds that the server asks to wait."""


class Stopped(Exception):
    """Nobody waits for this reply any more."""


class Endpoint:
    """A model of a server that speaks /chat/completions."""

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        key: str | None = None,
        *,
        temperature: float = 0.2,
        max_tokens: int = 1024,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 8,
    ) -> None:
        """Without a base URL it is OpenAI's; a server of one's own may need no key. `timeout` is in seconds."""
        self.name = re.sub(r"[^\w.+-]", "-", model)
        self.settings: dict[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.base_url, self.key = base_url, key or "none"
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.stopped = threading.Event()
        self.limit = LIMITS[0]
        self.not_before = 0.0  # on the monotonic clock; a rate limit is for all requests
        self.client: Any = None

    def tokens(self, prompt: Prompt) -> int:
        """About one to four bytes: the endpoint's tokenizer is not known."""
        return (len(prompt.system.encode()) + len(prompt.user.encode())) // 4

    def replies(self, prompts: Mapping[str, Prompt]) -> Iterator[tuple[str, Reply]]:
        """Replies as they come, `concurrency` requests at a time."""
        if not prompts:
            return
        if importlib.util.find_spec("openai") is None:
            raise ConfigError("asking an endpoint needs the package openai (the extra [judge]): pip install openai")
        from openai import OpenAI

        left = iter(prompts.items())
        running: dict[Future[Reply], str] = {}
        self.stopped.clear()
        with (
            OpenAI(base_url=self.base_url, api_key=self.key, max_retries=0, timeout=self.timeout) as self.client,
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool,
        ):
            try:
                while True:
                    for key, prompt in islice(left, self.concurrency - len(running)):
                        running[pool.submit(self.ask, prompt)] = key
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        reply = future.result()
                        yield running.pop(future), reply
            except (Refusal, KeyboardInterrupt):
                self.stopped.set()
                for future in as_completed(running):
                    if future.exception() is None:
                        yield running[future], future.result()
                raise
            finally:
                self.stopped.set()

    def ask(self, prompt: Prompt) -> Reply:
        """One reply, after as many tries as it takes."""
        for attempt in range(self.retries + 1):
            self.pause(self.not_before - time.monotonic())
            try:
                return self.once(prompt)
            except Fault as fault:
                if attempt == self.retries:
                    raise ServiceError(f"{fault} ({attempt + 1} tries); {self.advice()}") from fault
                if fault.after is not None and fault.after > LONGEST_WAIT:
                    raise ServiceError(f"{fault}; it asks to wait {fault.after:.0f} s; {self.advice()}") from fault
                if fault.after is not None:
                    self.not_before = max(self.not_before, time.monotonic() + fault.after)
                else:
                    first, most = BACKOFF
                    self.pause(min(most, first * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("the last try returns or raises")

    def pause(self, seconds: float) -> None:
        """Wait, unless the run ends."""
        if self.stopped.wait(max(0.0, seconds)):
            raise Stopped

    def once(self, prompt: Prompt) -> Reply:
        """One request; a Fault is what may pass, a ConfigError what will not."""
        import openai

        messages: Any = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        limit = self.limit
        settings = {limit if name == LIMITS[0] else name: value for name, value in self.settings.items()}
        try:
            raw = self.client.chat.completions.with_raw_response.create(messages=messages, **settings)
        except openai.APITimeoutError as error:
            raise Fault(f"{self.client.base_url} has not answered within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise Fault(f"{self.client.base_url} cannot be reached ({error.__cause__ or error})") from error
        except openai.APIStatusError as error:
            if error.status_code == 400 and limit == LIMITS[0] and LIMITS[1] in error.response.text:
                self.limit = LIMITS[1]
                return self.once(prompt)
            raise self.refused(error.status_code, error.response.headers, error.response.text, error.body) from error
        return read_reply(raw.http_response.text)

    def refused(self, status: int, headers: Mapping[str, str], text: str, body: Any) -> Exception:
        """What a status other than success means."""
        said = body.get("message") if isinstance(body, dict) else None
        why = f"{self.client.base_url} answers {status}: {said or text.strip()[:200] or 'without a word'}"
        spent = isinstance(body, dict) and body.get("code") == "insufficient_quota"
        if (status in PASSING and not spent) or status >= 500:
            return Fault(why, retry_after(headers))
        hint = "; does --base-url end as the server wants it, often in /v1?" if status == 404 else ""
        return ConfigError(f"{why}{hint}; replies so far are kept")

    def advice(self) -> str:
        return "replies so far are kept: run the same command again later, or with less --concurrency"


def read_reply(text: str) -> Reply:
    """The reply in a server's answer."""
    try:
        answer: Any = json.loads(text)
    except ValueError as error:
        raise Fault(f"what came is not JSON: {text.strip()[:200]!r}") from error
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise Fault(f"what came has no choices[0].message.content: {text.strip()[:200]!r}") from error
    if content is not None and not isinstance(content, str):
        raise Fault(f"the reply is no text: {content!r:.200}")
    usage = answer.get("usage")
    details: dict[str, Any] = {"finish_reason": choice.get("finish_reason"), "served_by": answer.get("model")}
    if isinstance(usage, dict):
        details["usage"] = {name: count for name, count in usage.items() if isinstance(count, int)}
    return Reply(content or "", {name: value for name, value in details.items() if value is not None})


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, which it says as a number or as a date; None where it does not."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass  # a date, or nothing
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
