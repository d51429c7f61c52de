"""A fork server for ranks: processes that begin with torch and the story imported already.

`import dan_dist.train` takes seconds of every process that starts afresh, MLflow as many. The
server imports once, starts no thread, and forks each rank; what torchrun would say in the
environment is set there.
"""

import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
PRELOADED = ["preloaded"]
GRACE_S = 20.0  # from the first rank's failure, or the time limit, to SIGKILL

_context = multiprocessing.get_context("forkserver")


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
    _start_server()
    common = {**os.environ, "OMP_NUM_THREADS": "1"}
    if n > 1:
        common |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    started = list[Rank]()
    for rank in range(n):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {}
        logs = folder / f"{rank}.out", folder / f"{rank}.err"
        result = folder / f"{rank}.result"  # a pipe would hold 64 KiB of it
        job = (logs, cwd or Path.cwd(), {**common, **own}, result, function, arguments)
        process = _context.Process(target=_work, args=job)
        process.start()
        started.append(Rank(process, result, logs))
    return started


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _start_server() -> None:
    """Starts the server, once; in place of one that packing has started, as a process has one.

    Its imports follow PYTHONPATH, its threads OMP_NUM_THREADS.
    """
    server = forkserver._forkserver
    if server._forkserver_pid is not None and server._preload_modules != PRELOADED:
        server._stop()
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    _context.set_forkserver_preload(PRELOADED)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(
    logs: tuple[Path, Path], folder: Path, environment: dict[str, str], result: Path,
    function: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    """One rank."""
    gc.freeze()  # a collection would go through all that the server has imported, and copy it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate(logs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A rank's own default, not its server's, under which whoever is killed leaves named semaphores.
    multiprocessing.set_start_method(None, force=True)
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
    process: BaseProcess
    result: Path
    logs: tuple[Path, Path]

    def ended(self) -> Ended:
        """What became of it; it has ended."""
        value, error = None, None
        with suppress(FileNotFoundError, EOFError):
            value, error = pickle.loads(self.result.read_bytes())
        out, err = (path.read_text() if path.is_file() else "" for path in self.logs)
        return Ended(value, error, self.process.exitcode or 0, out, err)


def _wait(started: list[Rank], timeout_s: float) -> list[int]:
    """Waits until all have ended, by themselves or killed; returns those that took too long."""
    deadline_s, is_failed = time.monotonic() + timeout_s, False
    running = [rank.process for rank in started]
    try:
        while running and time.monotonic() < deadline_s:
            wait([process.sentinel for process in running], deadline_s - time.monotonic())
            ended = [process for process in running if process.exitcode is not None]
            running = [process for process in running if process not in ended]
            if any(process.exitcode for process in ended):
                for process in running:
                    process.terminate()
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
                is_failed = True
        return [] if is_failed else [rank for rank, r in enumerate(started) if r.process in running]
    finally:
        for process in running:
            process.kill()
        for rank in started:
            rank.process.join(10)


def _texts(found: list[Ended]) -> str:
    return "".join(f"{ended.stdout}{ended.stderr}" for ended in found)
