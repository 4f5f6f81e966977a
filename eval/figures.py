"""Pictures on disk, for evaluation and for training."""

import io
import warnings
from pathlib import Path
from typing import Any

from models.files import write_whole


def save(figure: Any, target: Path) -> list[Path]:
    """Write a figure as PNG and as SVG, each there whole or not at all."""
    files = [target.with_suffix(".png"), target.with_suffix(".svg")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # names in any script; a box is drawn instead
        for file in files:
            content = io.BytesIO()
            figure.savefig(content, format=file.suffix[1:], dpi=150)
            write_whole(file, content.getvalue())
    return files
