"""A function run by several processes at once, as a launcher would start them, with what each of them gave."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.parallel.launch import environment


def together(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 90.0) -> list[Any]:
    """What `function(*arguments)` gave in each process, by rank. It has to join them itself, by `world.world`.

    An error in one of them is an AssertionError here, with all their tracebacks; so is one that does not end in time.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    with TemporaryDirectory() as folder:
        started = [
            context.Process(target=one, args=(function, rank, size, store.port, folder, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        try:
            for process in started:
                process.join(timeout)
            late = [rank for rank, process in enumerate(started) if process.is_alive()]
        finally:
            for process in started:
                process.kill()
                process.join()
        said = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not said, "\n".join(said)
        assert not late, f"processes {late} have not ended after {timeout} s"
        results = [Path(folder) / f"{rank}.pt" for rank in range(size)]
        gone = {rank: started[rank].exitcode for rank in range(size) if not results[rank].exists()}
        assert not gone, f"processes ended without a result, with exit codes {gone}"
        return [torch.load(path, weights_only=False) for path in results]


def one(function: Callable[..., Any], rank: int, size: int, port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    """The life of one process."""
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"process {rank}:\n{traceback.format_exc()}")
        sys.exit(1)
