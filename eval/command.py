"""`qlora eval TARGET --task NAME`: one command for every measurement, on a checkpoint or a run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from eval.perplexity import perplexity
from models import ConfigError, DataError
from models.target import LoadOptions, load_target

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure a model or a run on a task."""

    target: Positional[str]
    """A checkpoint or a run."""
    task: Literal["perplexity"] = "perplexity"
    """What to measure."""
    data: str
    """The text, a UTF-8 file."""
    protocol: Literal["windows"] = "windows"
    """windows: non-overlapping windows, the first token of each unscored."""
    window: int = 512
    """Tokens in a window."""
    limit: int | None = None
    """Take this many windows only, from the start."""
    max_chars: int | None = None
    """Take this many characters of the file only, from the start."""
    batch_size: int = 4
    """Windows at a time."""
    load: LoadOptions = LoadOptions()
    """How the model is loaded."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("limit", 1), ("max_chars", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")


def command(options: EvalOptions, console: "Console") -> dict[str, Any]:
    text = read_text(options.data, options.max_chars)
    model, tokenizer = load_target(options.target, options.load)
    if model.max_tokens is not None and options.window > model.max_tokens:
        raise ConfigError(f"window is {options.window}, but {options.target} knows {model.max_tokens} positions")
    ids = tokenizer.encode(text)
    result = perplexity(model, ids, options.window, options.limit, options.batch_size)
    error = "" if result.stderr is None else f" ± {result.stderr:.2f}"
    console.print(
        f"perplexity {result.perplexity:.2f}{error} ({result.protocol}: {result.windows} windows of "
        f"{result.window} tokens, {result.tokens} scored) of {options.target} on {options.data}"
    )
    limited = options.limit is not None or options.max_chars is not None
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "target": options.target,
        "data": options.data,
        "dtype": dtype,
        "limited": limited,
        **asdict(result),
    }


def read_text(path: str, max_chars: int | None) -> str:
    """The text of a file, or why there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"data: {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"data: {path}: byte {error.start} is not UTF-8; convert the file, for example with iconv"
        ) from error
    if not text.strip():
        raise DataError(f"data: {path}: is empty; a perplexity needs text")
    return text[:max_chars]
