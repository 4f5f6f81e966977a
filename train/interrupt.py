"""Ctrl-C and SIGTERM ask the loop to save and stop after the step it is in; the second one stops at once."""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, remembers the first signal in `signal` instead of letting it end the process.

    The second one does what it would have done without us; where that would kill the process on the spot, it ends with
    128 + signal, so that STATUS can be written. From then on signals mean what they meant before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self.previous = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal, and act on the second."""
        if self.signal is None:
            self.signal = number
            return
        previous = self.previous.get(number)
        self.restore()
        if callable(previous):
            previous(number, frame)
        elif previous is not signal.SIG_IGN:
            raise SystemExit(128 + number)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # pyrefly: ignore[bad-argument-type]
        self.previous = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
