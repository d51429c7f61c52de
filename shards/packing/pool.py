"""Work for several processes: a bounded number of tasks under way, results as they come.

Not joblib's: its workers go on with the tasks they hold after their parent was killed.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

MOST_WORKERS = 1024
SHARED_MEMORY = "/dev/shm"
LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")  # bytes
TASKS_AHEAD = 2  # handed to each worker in advance: their arguments are held in memory

T = TypeVar("T")


def worker_count(text: str) -> int:
    """The value of a program's --workers; 0 stands for all cores.

    Raises:
        argparse.ArgumentTypeError: it is no number that a machine can have.
    """
    if not text.isdecimal() or len(text) > 4 or int(text) > MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 0 to {MOST_WORKERS} processes")
    return int(text)


@contextmanager
def in_processes(
    function: Callable[..., T], arguments: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[Iterator[tuple[int, T]]]:
    """Yields (number of the task, its result) in the order in which tasks end.

    function: a module-level function. With one worker it runs in this process.
    """
    if workers <= 1:
        yield ((number, function(*task)) for number, task in enumerate(arguments))
        return
    # Not fork: the caller may hold torch's threads. The fork server starts from a clean process.
    context = multiprocessing.get_context("forkserver")
    with _without_main(), _open_pool(workers, context) as pool:
        try:
            yield _results(pool, function, enumerate(arguments), workers * TASKS_AHEAD)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died (out of memory?); the same command continues where it was"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _open_pool(workers: int, context: ForkServerContext) -> ProcessPoolExecutor:
    """The pool. Its processes share locks in /dev/shm, and meet at a socket in TMPDIR.

    Raises:
        OSError: one of the two does not let them; names it.
    """
    try:
        context.Lock()
    except OSError as error:
        reason = f"{error.strerror}; packing and checking share their locks there"
        raise OSError(error.errno, reason, SHARED_MEMORY) from error
    folder = tempfile.gettempdir()
    try:
        # A socket's name has 107 bytes at most. Python 3.14 goes to /tmp by itself.
        if len(os.fsencode(folder)) > LONGEST_TMPDIR:
            tempfile.tempdir = "/tmp"
        util.get_temp_dir()  # which is kept from now on
        forkserver.ensure_running()
    except OSError as error:
        reason = f"{error.strerror or error}; worker processes meet there"
        raise OSError(error.errno, reason, tempfile.gettempdir()) from error
    finally:
        tempfile.tempdir = folder
    return ProcessPoolExecutor(workers, context, _start_worker)


def _results(
    pool: ProcessPoolExecutor,
    function: Callable[..., T],
    tasks: Iterator[tuple[int, tuple[Any, ...]]],
    ahead: int,
) -> Iterator[tuple[int, T]]:
    running: dict[Future[T], int] = {}
    while True:
        while len(running) < ahead and (task := next(tasks, None)):
            running[pool.submit(function, *task[1])] = task[0]
        if not running:
            return
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(done), done.result()


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; when the parent is killed, its workers end with it.

    Left alone, they would go on writing while the next run writes the same files.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _without_main() -> Iterator[None]:
    """Worker processes import `__main__` again, which may be a training script: hide its path."""
    main = sys.modules["__main__"]
    names = vars(main)
    hidden: dict[str, Any] = {n: names.pop(n) for n in ("__file__", "__spec__") if n in names}
    try:
        main.__spec__ = None
        yield
    finally:
        names.update(hidden)
