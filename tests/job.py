"""A small job of several processes, which goes wrong as it is told: `python -m tests.job WHAT RANK`.

It stands in for a verb of the command line, and tells and ends as those do.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from models.errors import DataError, PeerError
from models.parallel import world
from models.parallel.failure import end_if_one_of_several, watched

TIMEOUT = 3.0


def go_wrong(what: str) -> None:
    """What one of the processes does while the others wait for it."""
    if what == "error":
        raise ZeroDivisionError("by hand")
    if what == "refusal":
        raise DataError("line 3 is bad")
    if what == "exit":
        raise SystemExit(3)
    if what == "os-exit":
        os._exit(7)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        with world.doing("a long sleep"):
            time.sleep(60)


def wait(collective: str) -> None:
    """What the others do."""
    x = torch.ones(4)
    with world.doing("the sums of step 5"):
        if collective == "recv":
            dist.recv(x, src=int(sys.argv[2]))
        elif collective == "barrier":
            world.barrier()
        elif collective == "from_main":
            world.from_main("x")
        elif collective == "stuck":  # as in a GPU's collective, which never comes back
            with world.last_words(lambda error: Path(sys.argv[4]).write_text(f"failed: {error}")):
                time.sleep(60)
        else:
            world.sums(1.0)


def main() -> int:
    what, who, collective = sys.argv[1], int(sys.argv[2]), sys.argv[3]

    def tell(error: BaseException) -> None:
        print(f"told: {error}", file=sys.stderr, flush=True)

    try:
        with watched(tell), world.world("cpu", TIMEOUT):
            if what == "all-refuse":
                time.sleep(world.rank() * 0.2)
                raise DataError("the data are bad")
            go_wrong(what) if world.rank() == who else wait(collective)
    except BaseException as error:
        code = error.exit_code if isinstance(error, DataError | PeerError) else None
        end_if_one_of_several(error, code)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
