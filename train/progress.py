"""One live line while a run goes on: step, loss, learning rate, tokens per second, memory, time left.

It goes to stderr, since stdout belongs to results. Where stderr is not a terminal the same figures come as
plain lines every few steps; quiet says nothing.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType


class Progress:
    """Shows the steps of a run; `write` also gets each plain line, for log.txt."""

    def __init__(
        self, total: int, *, done: int = 0, every: int = 10, quiet: bool = False, write: Callable[[str], None]
    ) -> None:
        self.total, self.first, self.every, self.quiet, self.write = total, done, every, quiet, write
        self.started: float | None = None
        """When the first step began; an evaluation before it is no measure of those to come."""
        self.live = None if quiet or not sys.stderr.isatty() else live_line()
        self.task = self.live.add_task("", total=total, completed=done, figures="") if self.live else None

    def begin(self) -> None:
        """A step begins."""
        self.started = self.started or time.perf_counter()

    def step(self, step: int, loss: float, rate: float, tokens_per_second: float, memory: int) -> None:
        """Show a finished step."""
        elapsed = time.perf_counter() - (self.started or time.perf_counter())
        left = elapsed / max(1, step - self.first) * (self.total - step)
        figures = (
            f"loss {loss:.4f}  lr {rate:.2e}  {tokens_per_second:,.0f} tokens/s  "
            f"{memory / 2**30:.2f} GiB  {clock(left)} left"
        )
        if self.live and self.task is not None:
            self.live.update(self.task, completed=step, figures=figures)
        if step in (self.first + 1, self.total) or step % self.every == 0:
            line = f"step {step}/{self.total}  {figures}"
            self.write(line)
            if not self.live and not self.quiet:
                print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Show a line that stays, above the live one."""
        self.write(text)
        if self.live:
            self.live.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()


def live_line():
    """Make rich's display of one line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Live

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[figures]}"))
    return Live(*columns, console=Console(stderr=True), refresh_per_second=4)


def clock(seconds: int | float) -> str:
    """Give a duration as people say it.

    >>> clock(5.2), clock(65), clock(3 * 3600 + 62)
    ('5s', '1m05s', '3h01m')
    """
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
