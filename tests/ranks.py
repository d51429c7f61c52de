"""Ranks: processes that begin with torch and the story imported, as `interpreter.py` forks them.

What torchrun would say in the environment is set there.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from interpreter import REPOSITORY, forked, python

GRACE_S = 20.0  # from the first rank's failure, or the time limit, to SIGKILL


class Ended(NamedTuple):
    """What became of a rank: its result, or its exception, or its exit code."""

    value: Any
    error: BaseException | None
    code: int
    stdout: str
    stderr: str


def ranks(n: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list:
    """The results of `function(*arguments)` on n ranks, which torch.distributed can join.

    function: of a module, as it is pickled by name. The first rank's exception is raised here.
    """
    found = run_ranks(n, function, *arguments, timeout_s=timeout_s)
    for ended in found:
        if ended.error is not None:
            ended.error.add_note(_texts(found))
            raise ended.error
    assert not any(ended.code for ended in found), _texts(found)
    return [ended.value for ended in found]


def run_ranks(
    n: int,
    function: Callable[..., Any],
    *arguments: Any,
    cwd: Path | None = None,
    timeout_s: float = 120,
) -> list[Ended]:
    """As `ranks`, but with each rank's end, whatever it was.

    As under torchrun, the others get SIGTERM once one has failed. Nothing outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        started = start_ranks(n, function, *arguments, cwd=cwd, folder=Path(folder))
        late = _wait(started, timeout_s)
        found = [rank.ended() for rank in started]
    assert not late, f"ranks {late} took more than {timeout_s} s\n{_texts(found)}"
    return found


def start_ranks(
    n: int, function: Callable[..., Any], *arguments: Any, cwd: Path | None = None, folder: Path
) -> "list[Rank]":
    """Starts n ranks, which are the caller's to wait for; their output goes into `folder`."""
    common = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    if n > 1:
        common |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    (job := folder / "job").write_bytes(pickle.dumps((function, arguments)))
    started = list[Rank]()
    for rank in range(n):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {}
        logs = folder / f"{rank}.out", folder / f"{rank}.err"
        result = folder / f"{rank}.result"  # a pipe would hold 64 KiB of it
        with logs[0].open("wb") as out, logs[1].open("wb") as err:
            process = subprocess.Popen(
                [python(), "-u", __file__, job, result], cwd=cwd, env={**common, **own},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip
        started.append(Rank(process, result, logs))
    return started


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def work(job: Path, result: Path) -> None:
    """One rank."""
    function, arguments = pickle.loads(job.read_bytes())
    try:
        result.write_bytes(pickle.dumps((function(*arguments), None)))
    except SystemExit:
        raise
    except BaseException as error:
        try:
            content = pickle.dumps((None, error))
            pickle.loads(content)
        except Exception:  # of an exception that cannot be pickled, the text
            content = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        result.write_bytes(content)
        raise SystemExit(1) from error


class Rank(NamedTuple):
    process: subprocess.Popen[bytes]
    result: Path
    logs: tuple[Path, Path]

    def send(self, number: int) -> None:
        """Sends a signal to the rank itself, with which the program that stands for it ends."""
        if self.process.poll() is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.kill(forked(self.process.pid), number)

    def ended(self) -> Ended:
        """What became of it; it has ended."""
        value, error = None, None
        with suppress(FileNotFoundError, EOFError):
            value, error = pickle.loads(self.result.read_bytes())
        out, err = (path.read_text() if path.is_file() else "" for path in self.logs)
        return Ended(value, error, self.process.returncode or 0, out, err)


def _wait(started: list[Rank], timeout_s: float) -> list[int]:
    """Waits until all have ended, by themselves or killed; returns those that took too long."""
    deadline_s, is_failed, running = time.monotonic() + timeout_s, False, started
    ends = {rank.process.pid: os.pidfd_open(rank.process.pid) for rank in started}
    try:
        while running and time.monotonic() < deadline_s:
            wait([ends[rank.process.pid] for rank in running], deadline_s - time.monotonic())
            ended = [rank for rank in running if rank.process.poll() is not None]
            running = [rank for rank in running if rank not in ended]
            if any(rank.process.returncode for rank in ended):
                for rank in running:
                    rank.send(signal.SIGTERM)
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
                is_failed = True
        return [] if is_failed else [n for n, rank in enumerate(started) if rank in running]
    finally:
        for rank in running:
            rank.send(signal.SIGKILL)
        for rank in started:
            rank.process.wait(10)
        for end in ends.values():
            os.close(end)


def _texts(found: list[Ended]) -> str:
    return "".join(f"{ended.stdout}{ended.stderr}" for ended in found)


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
