"""Presets: settings by name, from TOML files that are shipped.

A preset is laid under whatever is given besides it, several of them one over the other in the order given. Its file
may itself name presets to be laid over (`preset = "qlora"`), as any settings file may. What depends on the model's size
(or, for GLUE, on the task) stands in tables of their own, as the columns of the paper's Table 9 do:

    [sizes.33b]
    optimizer.learning_rate = 1e-4

makes of alpaca.toml a preset alpaca-33b as well.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from train.toml import Layer, load_table


@dataclass(frozen=True)
class Preset:
    """What a preset file says about itself."""

    name: str
    summary: str
    """The file's first comment."""
    sizes: tuple[str, ...]
    """Each of them after a hyphen makes a name too."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}-{size}" for size in self.sizes))


def presets(directory: Path) -> list[Preset]:
    """List the presets of a directory."""
    found = []
    for path in sorted(directory.glob("*.toml")):
        first = path.read_text("utf-8").partition("\n")[0]
        found.append(Preset(path.stem, first.removeprefix("#").strip(), tuple(load_table(path).get("sizes", {}))))
    return found


def preset_layers(directory: Path, name: str) -> list[Layer]:
    """Give a preset's tables, those it is laid over first."""
    known = {each: preset for preset in presets(directory) for each in preset.names}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
        raise ConfigError(f"preset {name!r} is not known{hint} (qlora list presets)")
    preset = known[name]
    table = load_table(directory / f"{preset.name}.toml")
    size = table.pop("sizes", {}).get(name.removeprefix(f"{preset.name}-"), {})
    layers = with_presets(directory, Layer(f"preset {preset.name}", table))
    return [*layers, Layer(f"preset {name}", size)] if size else layers


def with_presets(directory: Path | None, layer: Layer) -> list[Layer]:
    """Give a table after the presets that its key `preset` names; without a directory that key is none."""
    if directory is None or "preset" not in layer.table:
        return [layer]
    table: dict[str, Any] = {key: value for key, value in layer.table.items() if key != "preset"}
    names = layer.table["preset"]
    names = [names] if isinstance(names, str) else names
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{layer.origin}: preset: must be a name or a list of names, not {names!r}")
    try:
        return [*(below for name in names for below in preset_layers(directory, name)), Layer(layer.origin, table)]
    except ConfigError as error:
        raise ConfigError(f"{layer.origin}: {error}") from None
