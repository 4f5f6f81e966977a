"""What `qlora inspect` found, as a person reads it."""

from itertools import takewhile
from statistics import mean
from typing import TYPE_CHECKING, Any

from models.adapter_norms import AdapterLayer
from models.adapter_vectors import KINDS
from models.checkpoint import shortened

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table


def show(found: dict[str, Any], console: "Console") -> None:
    """Print a checkpoint, an adapter or a run."""
    blocks = {"checkpoint": checkpoint, "adapter": adapter, "run": run}[found["kind"]]
    for block in blocks(found):
        console.print(block, soft_wrap=isinstance(block, str))


def checkpoint(found: dict[str, Any]) -> list["RenderableType"]:
    task, sizes = found["task"], ", ".join(f"{name} {value}" for name, value in found["sizes"].items())
    blocks: list[RenderableType] = [
        f"{found['path']}: {found['layout']}",
        f"{found['architecture']}{f' ({task})' if task else ''}: {sizes}",
        f"{found['parameters']:,} parameters in {found['bytes'] / 1e6:,.1f} MB: "
        f"{found['bits_per_weight']:.3f} bits per weight",
        "tensors by type: " + ", ".join(f"{count} {kind}" for kind, count in found["types"].items()),
    ]
    for quant in found["quantization"]:
        nested = f", scales in 8 bits (blocks of {quant['nested_block_size']})" if quant["double_quant"] else ""
        blocks.append(
            f"{quant['layers']} layers in {quant['codebook']}, blocks of {quant['block_size']}{nested}; their error is "
            "not known without the original (`qlora quantize` and `qlora merge --base` measure it)"
        )
    if found["fresh"]:
        blocks.append(f"not in the file, made anew on loading: {', '.join(found['fresh'])}")
    table = columns("part", "tensors", "parameters", "stored as", "MB", "bits/weight")
    for part in found["parts"]:
        for i, (kind, nbytes) in enumerate(part["nbytes"].items()):
            first = (part["name"], f"{part['tensors']:,}", f"{part['parameters']:,}") if i == 0 else ("", "", "")
            bits = f"{part['bits_per_weight']:.3f}" if i == 0 else ""
            table.add_row(*first, kind, f"{nbytes / 1e6:,.2f}", bits)
    blocks += [table, found["precision"]]
    if "tensors" in found:
        listed = columns("tensor", "shape", "type")
        for name, tensor in found["tensors"].items():
            listed.add_row(name, "×".join(map(str, tensor["shape"])), tensor["type"])
        blocks.append(listed)
    return blocks


def adapter(found: dict[str, Any]) -> list["RenderableType"]:
    if found["vectors"]:
        return vectors(found)
    layers = [AdapterLayer(**layer) for layer in found["layers"]]
    ranks = ", ".join(map(str, found["ranks"]))
    scalings = sorted({layer.scaling for layer in layers if layer.scaling is not None})
    if scalings:
        scale = f"alpha {found['alpha']:g}, scaling {', '.join(f'{s:g}' for s in scalings)}"
    else:
        scale = "alpha is not in the file, so the norms are without the scaling"
    blocks: list[RenderableType] = [
        f"{found['path']}: adapter ({found['layout']})",
        f"rank {ranks}, {scale}; {len(layers)} layers: {', '.join(found['targets'])}",
        sizes(found),
    ]
    used = [name for name in ("dora", "rslora") if (found["settings"] or {}).get(name)]
    if used:
        blocks.append(f"with {' and '.join(used)}")
    if found["others"]:
        blocks.append(f"{len(found['others'])} tensors beside A and B: {shortened(list(found['others']), 4)}")
    table = by_block(layers)
    return [*blocks, type_table(table), block_table(table)]


def vectors(found: dict[str, Any]) -> list["RenderableType"]:
    """An adapter of another method than LoRA."""
    table = columns(f"{found['method']}: {KINDS[found['method']]}", "numbers", "root mean square", "largest")
    for row in found["vectors"]:
        table.add_row(row["name"], f"{row['numbers']:,}", f"{row['root_mean_square']:.4g}", f"{row['largest']:.4g}")
    return [f"{found['path']}: adapter ({found['layout']})", sizes(found), table]


def sizes(found: dict[str, Any]) -> str:
    return f"{found['parameters']:,} parameters in {found['bytes'] / 1e6:,.2f} MB ({', '.join(found['types'])})"


def run(found: dict[str, Any]) -> list["RenderableType"]:
    quant = found["quant"]
    stored = f"{quant['codebook']}, blocks of {quant['block_size']}" if quant else "not quantized"
    blocks: list[RenderableType] = [
        f"{found['path']}: run, {found['status'] or 'without a STATUS'}, {found['steps']} steps",
        f"base {found['base']}{'' if found['base_is_there'] else ' (not there any more)'}, {stored}",
    ]
    for name, key in (("last training loss", "loss"), ("last held-out loss", "held_out_loss")):
        if found[key] is not None:
            blocks.append(f"{name} {found[key]:.4f}")
    if found["adapter"] is not None:
        return [*blocks, *adapter(found["adapter"])]
    if found["model"] is not None:
        return [*blocks, "every weight was trained", *checkpoint(found["model"])]
    return [*blocks, f"no {'adapter' if found['adapters'] else 'model'} yet"]


def type_table(blocks: dict[str, dict[str, AdapterLayer]]) -> "Table":
    """Means over the layers of each type."""
    table = columns("mean norms", "layers", "A", "B", "s B A", "largest s B A")
    kinds = {kind: None for row in blocks.values() for kind in row}
    for kind in kinds:
        group = [row[kind] for row in blocks.values() if kind in row]
        values = (mean(x.a for x in group), mean(x.b for x in group), mean(x.delta for x in group))
        largest = max(layer.delta for layer in group)
        table.add_row(kind, str(len(group)), *(f"{value:.4g}" for value in (*values, largest)))
    return table


def block_table(blocks: dict[str, dict[str, AdapterLayer]]) -> "Table":
    """||s B A|| of every layer, a row for each block."""
    kinds = list(dict.fromkeys(kind for row in blocks.values() for kind in row))
    owners = [block.split(".")[:-1] for block in blocks]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    prefix = "".join(f"{parts[0]}." for parts in shared)
    table = columns("block", *kinds)
    table.title = f"norm of s B A in {prefix or 'each block'}"
    for block, row in blocks.items():
        table.add_row(block.removeprefix(prefix), *(f"{row[kind].delta:.3g}" if kind in row else "" for kind in kinds))
    return table


def by_block(layers: list[AdapterLayer]) -> dict[str, dict[str, AdapterLayer]]:
    """The layers of each block by their type: as much of the end of a name as tells them apart."""
    longest = max(layer.name.count(".") + 1 for layer in layers)
    places: dict[tuple[str, str], AdapterLayer] = {}
    for depth in range(1, longest + 1):
        places = {place(layer.name, depth): layer for layer in layers}
        if len(places) == len(layers):
            break
    table: dict[str, dict[str, AdapterLayer]] = {}
    for (block, kind), layer in sorted(places.items(), key=lambda item: counted(item[0][0])):
        table.setdefault(block, {})[kind] = layer
    return table


def place(name: str, depth: int) -> tuple[str, str]:
    """A layer's block, up to the first number in its name, and the last `depth` parts of the rest."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), -1)
    return ".".join(parts[: first + 1]), ".".join(parts[first + 1 :][-depth:])


def counted(block: str) -> list[tuple[int, str]]:
    """A key that puts block 10 behind block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in block.split(".")]


def columns(first: str, *rest: str) -> "Table":
    from rich.table import Table

    table = Table()
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, justify="right", overflow="fold")
    return table
