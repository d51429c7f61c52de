"""A Python that has imported torch, MLflow and the story already: a server forks each process.

A test that runs a command pays seconds of CPU for its imports, and a launcher's agent pays again
for each rank. `stand_in` writes a program that takes `python`'s place: it hands its command line,
environment, working folder and three streams to the server, passes signals on, and ends as the
forked process ends. Where a fresh interpreter could differ from a forked one, it becomes the real
Python: with `-c` and other options, another user, limit, namespace (but for mounts, which the
forked process enters) or PYTHONPATH, or open pipes.
(Slurm signals a step's processes by their parents, among which forked ones are not.)
"""

import ctypes
import fcntl
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
# What `preloaded`'s modules read from the environment as they are imported.
# (OpenCV and scikit-learn set LD_LIBRARY_PATH and KMP_* in whatever imports them.)
READ_AT_IMPORT = ("HOME", "LANG", "LC_", "LD_PRELOAD", "MALLOC", "MKL", "MPL", "OMP", "OPENBLAS",
                  "PYTHON", "TORCHINDUCTOR", "TORCH_LOGS", "TZ")  # fmt: skip
HARMLESS = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "PYTHON_EXEC",
            "TORCHINDUCTOR_CACHE_DIR")  # minded, of no effect, or read later  # fmt: skip
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1,
             signal.SIGUSR2)  # fmt: skip
NAMESPACES = ("cgroup", "ipc", "net", "pid", "user", "uts")
START_S = 120.0
PROGRAM = "DAN_TESTS_PYTHON"  # the program's path, in the environment
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x20000


def stand_in(folder: Path) -> Path:
    """Writes the program, which starts its server when it is first run; `stop` ends that."""
    program = folder / "python"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    (folder / "environment.json").write_text(json.dumps(environment))
    program.write_text(
        f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from interpreter import hand_over\nhand_over({str(folder)!r}, {sys.executable!r}, "
        f"{os.getpid()})\n"
    )
    program.chmod(0o755)
    return program


def stop(folder: Path) -> None:
    """Ends the server, and with it all that it has forked."""
    if (pid := folder / "pid").is_file():
        os.kill(int(pid.read_text()), signal.SIGTERM)


def python() -> str:
    """The program, where there is one: pytest writes it; else the real Python."""
    return os.environ.get(PROGRAM, sys.executable)


def forked(pid: int) -> int:
    """The process that the program of this number stands for, or the number itself: it is real."""
    try:
        return int(Path(python()).with_name(f"of {pid}").read_text())
    except FileNotFoundError:  # not forked yet, or not any more
        return pid


def hand_over(folder: str, real: str, owner: int) -> NoReturn:
    """The program: this process stands for the one that the server forks, or becomes `real`.

    owner: the process with which the server ends.
    """
    words = sys.argv[1:]
    known = json.loads(Path(folder, "environment.json").read_text())
    script = words[1:] if words[:1] == ["-u"] else words
    if not _is_alike(script, known):
        os.execv(real, [real, *words])
    connection = _connect(folder, real, owner, known)
    request = {
        "words": script,
        "unbuffered": script != words,
        "environment": dict(os.environ),
        "cwd": str(Path.cwd()),
        "surroundings": _surroundings(),
        "pid": os.getpid(),
        "executable": sys.argv[0],
        "ignored": [n for n in PASSED_ON if signal.getsignal(n) == signal.SIG_IGN],
    }
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    answer = connection.recv(4)
    if not answer:  # the surroundings are not the server's
        os.execv(real, [real, *words])
    pid = struct.unpack("i", answer)[0]

    def pass_on(number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):  # it has just ended; how, is still on its way
            os.kill(pid, number)

    for number in PASSED_ON:  # ignored ones too: the process may come to listen to them
        signal.signal(number, pass_on)
    if "RANK" in os.environ:  # as a rank itself asks for
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    code = struct.unpack("i", connection.recv(4) or struct.pack("i", -signal.SIGKILL))[0]
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _is_alike(words: list[str], known: dict[str, str]) -> bool:
    """Whether a fresh interpreter would import what the server has imported, and the same way."""
    if not words or (words[0].startswith("-") and words[0] != "-m"):
        return False
    paths = os.environ.get("PYTHONPATH", "").split(":")
    mine, servers = (
        {k: v for k, v in e.items() if k.startswith(READ_AT_IMPORT) and k not in HARMLESS}
        for e in (os.environ, known)
    )
    return {*paths} == {str(REPOSITORY)} and mine == servers and not _has_pipes()


def _has_pipes() -> bool:
    """Whether the process that started this one has left it files besides the three streams."""
    for path in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # of the listing itself, closed by now
            if int(path.name) > 2 and os.get_inheritable(int(path.name)):
                return True
    return False


def _surroundings() -> list[Any]:
    """What a process inherits and no message carries."""
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = [list(resource.getrlimit(getattr(resource, name))) for name in names]
    spaces = [str(Path(f"/proc/self/ns/{name}").readlink()) for name in NAMESPACES]
    groups = Path("/proc/self/cgroup").read_text()
    umask = os.umask(0o22)
    os.umask(umask)
    cores = sorted(os.sched_getaffinity(0))
    return [os.getuid(), os.getgid(), umask, limits, spaces, groups, cores]


def _connect(folder: str, real: str, owner: int, known: dict[str, str]) -> socket.socket:
    """A connection to the server, which the first process starts."""
    with Path(folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(folder, "socket").exists():
            with Path(folder, "log").open("w") as log:
                subprocess.Popen([real, __file__, folder, str(owner)], stdin=subprocess.DEVNULL,
                                 stdout=log, stderr=log, start_new_session=True, env=known,
                                 cwd="/")  # fmt: skip
            deadline_s = time.monotonic() + START_S
            while not Path(folder, "socket").exists():
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"no server:\n{Path(folder, 'log').read_text()}")
                time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(Path(folder, "socket")))
    return connection


class Process(NamedTuple):
    """A forked process and the program that stands for it."""

    pid: int
    note: Path  # its number, under the program's
    end: int  # a pidfd, which is readable once the process has ended
    program: socket.socket

    def kill(self) -> None:
        """Kills the process and its session, as the program was killed."""
        for kill in (os.killpg, os.kill):  # it may not have its session yet
            with suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)


class Server:
    """Forks a process for each request until `owner` ends."""

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder = folder
        self.surroundings = json.loads(json.dumps(_surroundings()))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "new"))
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(os.pidfd_open(owner), selectors.EVENT_READ, "owner")
        (folder / "pid").write_text(str(os.getpid()))
        (folder / "new").rename(folder / "socket")

    def run(self) -> dict[str, Any]:
        """Returns, in each forked process, its request; in the server never."""
        while True:
            for key, _ in self.selector.select():
                if key.data == "owner":
                    os._exit(0)
                elif key.fileobj is self.listener:
                    if (request := self._accept()) is not None:
                        return request
                elif key.fileobj == key.data.end:
                    self._ended(key.data)
                else:  # nothing comes from a program but its end
                    key.data.kill()
                    self.selector.unregister(key.data.program)

    def _accept(self) -> dict[str, Any] | None:
        """Takes a request and forks its process, in which the request is returned."""
        program, _address = self.listener.accept()
        content, streams, _, _ = socket.recv_fds(program, 1 << 16, 3)
        while content and not content.endswith(b"\n"):
            content += program.recv(1 << 16)
        request = json.loads(content or "{}")
        if request.get("surroundings") != self.surroundings:
            program.close()
        elif (pid := os.fork()) == 0:
            for socket_ in (self.selector, self.listener, program):
                socket_.close()
            return {**request, "streams": streams}
        else:
            peer = program.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            note = self.folder / f"of {struct.unpack('3i', peer)[0]}"
            process = Process(pid, note, os.pidfd_open(pid), program)
            (new := self.folder / "of").write_text(str(pid))
            new.rename(note)
            self.selector.register(program, selectors.EVENT_READ, process)
            self.selector.register(process.end, selectors.EVENT_READ, process)
            program.send(struct.pack("i", pid))
        for number in streams:
            os.close(number)
        return None

    def _ended(self, process: Process) -> None:
        """Tells the program how its process has ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
        process.note.unlink(missing_ok=True)
        with suppress(OSError):
            process.program.send(struct.pack("i", code))
        for file in (process.end, process.program):
            with suppress(KeyError):  # the program was killed before
                self.selector.unregister(file)
        os.close(process.end)
        process.program.close()


def become(request: dict[str, Any]) -> None:
    """Makes this process the one that was asked for, up to the command itself."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives the server
    for number in PASSED_ON:
        is_ignored = number in request["ignored"]
        signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    enter_mounts(request["pid"])
    os.chdir(request["cwd"])
    unbuffered = request["unbuffered"]
    sys.stdout.reconfigure(line_buffering=unbuffered, write_through=unbuffered)  # type: ignore
    sys.executable = request["executable"]
    tempfile.tempdir = None  # by this environment, not the server's


def enter_mounts(pid: int) -> None:
    """Sees the disks that a process sees, which `unshare -m` may have given disks of its own."""
    theirs = Path(f"/proc/{pid}/ns/mnt")
    if not theirs.samefile("/proc/self/ns/mnt"):
        file = os.open(theirs, os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file, _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), f"setns to the mounts of {pid}")
        os.close(file)


def run(words: list[str]) -> None:
    """Runs `SCRIPT …` or `-m MODULE …` as Python does."""
    sys.path.pop(0)  # this file's folder
    safe = "PYTHONSAFEPATH" in os.environ
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[:0] = [] if safe else [str(Path.cwd())]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[:0] = [] if safe else [str(Path(words[0]).resolve().parent)]
        runpy.run_path(words[0], run_name="__main__")


def end(words: list[str]) -> NoReturn:
    """Runs the command and ends as the project's programs do."""
    from shards.command import end as leave

    code = 0
    try:
        run(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    leave(code)


if __name__ == "__main__":
    if os.fork():  # the server is nobody's child: Slurm kills all that is below a step
        os._exit(0)
    from dan_dist.run.cli import imports

    with imports():  # a collection in a forked process would copy all that the server holds
        import preloaded  # noqa: F401
    asked = Server(Path(sys.argv[1]), int(sys.argv[2])).run()
    become(asked)
    end(asked["words"])
