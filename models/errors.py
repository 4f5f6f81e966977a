"""The refusals a person meets at the command line, each with the exit code that scripts can test.

They are ValueErrors, so a library caller needs to know none of them. Their text says what failed, where,
what came, and what to do.
"""

from typing import Any


class Refusal(ValueError):
    """Input that cannot be used as given."""

    exit_code: int = 2
    report: dict[str, Any] | None = None
    """What was found out before the refusal; `--json` prints it."""


class ConfigError(Refusal):
    """A setting, a flag or a key that is unknown, of the wrong type or impossible."""

    exit_code = 2


class DataError(Refusal):
    """A data file or a record in it that cannot be trained or evaluated on."""

    exit_code = 3


class CheckpointError(Refusal):
    """A checkpoint, tokenizer or adapter that is broken, hostile or for another model."""

    exit_code = 4


class NoTokenizerError(CheckpointError):
    """A checkpoint that no tokenizer lies beside."""


class NonFiniteError(Refusal):
    """A loss or gradient that is no longer a number."""

    exit_code = 6


class WriteError(Refusal):
    """A run's directory that takes no more: a full disk, a quota.

    It has a code of its own, since nothing that was given is wrong: with room made, the same command goes on.
    """

    exit_code = 7


class PeerError(Refusal):
    """Another process of the same job has failed, or does not come: this one cannot go on without it."""

    exit_code = 9


class ServiceError(Refusal):
    """A server that does not answer, however often it is asked.

    Nothing that was given is wrong: later the same command goes on.
    """

    exit_code = 8
