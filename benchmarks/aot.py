"""The gate before a GPU: every kernel that is shipped, compiled for chips that need not be here, and read.

`python -m benchmarks.aot sm_80 sm_90` compiles each (kernel, configuration) that a module of `kernels` lists in its
`shipped()` and prints one JSON object a line: registers, spills, shared memory and the chip's limit, whether products
are issued for four warps at once, and instructions per weight in the main loop beside the recorded figure.
What spills, does not fit, or takes more instructions than recorded is a failure.

Compiling and Triton's interpreter do not go together in one process, so `gate` starts processes of its own, one a
chip.
"""

import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kernels
from benchmarks import sass
from kernels.launch import Shipped

if TYPE_CHECKING:
    from rich.table import Table

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes that one block may have
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one kernel became on one chip."""

    name: str
    chip: str
    problem: str | None = None
    """Why it did not compile, in one line; the figures are then 0."""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    """Bytes of shared memory."""
    shared_limit: int = 0
    warpgroup: bool = False
    """Products are issued for four warps at once: wgmma on sm_90, tcgen05 on sm_100."""
    instructions: float | None = None
    """Per weight in the main loop; None where the kernel is not counted."""
    recorded: float | None = None
    """The figure above which `instructions` is a failure."""

    def failures(self) -> list[str]:
        """What the gate holds against it, in words."""
        if self.problem:
            return [f"{self.name} on {self.chip} does not compile: {self.problem}"]
        found = []
        if self.spills:
            found.append(f"{self.name} on {self.chip} spills registers {self.spills} times")
        if self.shared > self.shared_limit:
            found.append(
                f"{self.name} takes {self.shared} bytes of shared memory, and {self.chip} has {self.shared_limit}"
            )
        if self.instructions is not None and self.recorded is not None and self.instructions > self.recorded:
            found.append(
                f"{self.name} on {self.chip} takes {self.instructions:.2f} instructions per weight, "
                f"more than the {self.recorded} recorded"
            )
        return found


def gate(chips: Sequence[str]) -> list[Report]:
    """Every shipped kernel on every chip, compiled two chips at a time in processes without the interpreter."""
    check_chips(chips)
    with ThreadPoolExecutor(2) as pool:
        return [report for reports in pool.map(gate_of, chips) for report in reports]


def gate_of(chip: str) -> list[Report]:
    """Every shipped kernel on one chip, by one process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", chip]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"compiling for {chip} ended with status {done.returncode}: {last[0]}")
    return [Report(**json.loads(line)) for line in done.stdout.splitlines()]


def table(reports: Sequence[Report]) -> "Table":
    """The reports as a table for a person."""
    from rich.table import Table

    table = Table("kernel", "chip", "registers", "spills", "shared KiB", "of", "wgmma", "instr/weight", "recorded")
    for r in reports:
        if r.problem:
            table.add_row(r.name, r.chip, r.problem)
            continue
        counts = ["" if value is None else f"{value:.2f}" for value in (r.instructions, r.recorded)]
        sizes = [f"{size / 1024:.1f}".removesuffix(".0") for size in (r.shared, r.shared_limit)]
        row = (str(r.registers), str(r.spills), *sizes, "yes" if r.warpgroup else "no", *counts)
        table.add_row(r.name, r.chip, *row, style="red" if r.failures() else None)
    return table


def check_chips(chips: Sequence[str]) -> None:
    for chip in chips:
        if chip not in SHARED_LIMITS:
            raise ValueError(f"a chip to compile for must be one of {', '.join(SHARED_LIMITS)}, not {chip!r}")


# In the process that compiles


def main(chips: Sequence[str]) -> None:
    """Print the reports of every shipped kernel on these chips, one JSON object a line."""
    check_chips(chips)
    for chip in chips:
        for shipped in all_shipped():
            with contextlib.redirect_stdout(io.StringIO()):  # a failed ptxas has thousands of lines printed
                report = compiled(shipped, chip)
            print(json.dumps(asdict(report)), flush=True)


def all_shipped() -> Iterator[Shipped]:
    """What the modules of `kernels` say that they may launch."""
    for module in pkgutil.iter_modules(kernels.__path__):
        shipped = getattr(importlib.import_module(f"kernels.{module.name}"), "shipped", None)
        yield from shipped() if shipped else ()


def compiled(shipped: Shipped, chip: str) -> Report:
    """One kernel compiled for one chip, and what its machine code says."""
    capability = int(chip.removeprefix("sm_"))
    about = {"name": shipped.name, "chip": chip, "shared_limit": SHARED_LIMITS[chip]}
    try:
        kernel = compile_for(shipped, capability)
        listing, usage = disassemble(kernel.asm["cubin"])
    except Exception as error:  # whatever the compiler raises is a row of the table, not the end of it
        return Report(**about, problem=one_line(f"{type(error).__name__}: {error}"))
    instructions, loops = sass.read(listing)
    per_thread = shipped.weights_per_thread
    registers = re.search(r"REG:(\d+)", usage)
    assert instructions
    assert registers
    return Report(
        **about,
        registers=int(registers[1]),
        spills=sass.spills(instructions),
        shared=kernel.metadata.shared,
        warpgroup=sass.warpgroup(instructions),
        instructions=sass.work(sass.main_loop(instructions, loops)) / per_thread if per_thread else None,
        recorded=shipped.instructions.get(capability),
    )


def compile_for(shipped: Shipped, capability: int) -> Any:
    """Triton's compiled kernel, as the launch that `shipped` stands for would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, launch = shipped.kernel.arg_names, shipped.launch
    source = ASTSource(
        fn=shipped.kernel,
        signature={name: "constexpr" if name in launch.constants else shipped.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in shipped.aligned},
    )
    options = {key: value for key, value in launch.options().items() if key not in launch.constants}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The listing of a binary, and what it uses, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def output(*command: str) -> str:
            command = (str(tools / command[0]), *command[1:], str(path))
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return output("nvdisasm", "-c"), output("cuobjdump", "-res-usage")


def one_line(message: str) -> str:
    """The line that says what is wrong, of an error that may hold a whole program."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines[1:] if re.search(r"\berror\b", line, re.IGNORECASE)] or lines[1:][-1:]
    return " ".join([*lines[:1], *telling[:1]])[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
