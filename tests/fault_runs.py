"""Runs of the two scripts, each in a process of its own that can be killed at any instant, begun without a delay.

A server process imports everything once and forks a child for each run. Nothing has been computed in it, so that its
children find torch as a new process would.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


class RunServer:
    """Starts runs. Of each it tells the process number, and how it ended: an exit code, or minus a signal."""

    def __init__(self, num_threads: int):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, stage: str, flags: list[str], printed: Path) -> int:
        self.process.stdin.write(json.dumps([stage, flags, str(printed)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())


@contextmanager
def run_server(num_threads: int = 1) -> Iterator[RunServer]:
    server = RunServer(num_threads)
    try:
        yield server
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)  # with a child, if there is one
        server.process.communicate()


def run(stage: str, flags: list[str], printed: str) -> None:
    """The life of a child: one run of a script, and what it prints in a file."""
    code = 1
    try:
        handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        with exit_on_input_error():
            MAINS[stage](flags)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import train_autoencoder
    import train_latent_diffusion
    from flower_ldm.errors import exit_on_input_error

    MAINS = {"autoencoder": train_autoencoder.main, "latent_diffusion": train_latent_diffusion.main}
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(*json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
