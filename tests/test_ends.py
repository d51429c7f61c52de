"""How commands end: stopped while they start, without a reader, in other encodings, by an error."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY, outcome
from dan_dist import programs
from dan_dist.run import cli
from dan_dist.run.environment import give_home, report_failure
from dan_dist.run.outcome import RESERVE, keep_room, write_outcome
from dan_dist.run.signals import Stopped, StopRequest
from shards.command import words
from shards.files import locked
from shards.format import ShardSet

# Sends this process a signal at the import of MODULE, once, then goes on with the program.
SIGNALLED = """
import os, runpy, signal, sys
class Signal:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Signal())
sys.argv = {words!r}
getattr(runpy, {run!r})(sys.argv[0], run_name="__main__", **{options!r})
"""
PROGRAMS = {
    "shards.pack": ("numpy", ["folder", "--source", "a", "--out", "b"], 130),
    "shards.verify": ("tqdm", ["a"], 130),
    "shards.show": ("PIL", ["a"], 130),
    "shards.align": ("numpy", ["--source", "a", "--weights", "b", "--out", "c"], 130),
    "dan_dist.tracking": ("dan_dist.tracking.tracker", ["replay", "a"], 130),
    "train": ("pydantic", [], 130),
    "evaluate": ("torch", ["a", "--data", "b"], 130),
    "predict": ("torch", ["a", "b"], 130),
    "explain": ("dan_dist.inference.explain", ["a", "b"], 130),
    "export": ("torch", ["a"], 130),
    "ablate": ("yaml", ["heads"], 130),
    "certify": ("nvidia", ["demo"], 130),
    "bench": ("torch", ["order"], 130),
    "dan_dist.keys": ("pydantic", [], 130),
}


def python(*words: str, cwd: Path, **change: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **change}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_in_the_midst_of_imports_is_one_line(tmp_path: Path, program: str) -> None:
    module, arguments, code = PROGRAMS[program]
    is_module = "." in program
    first = program if is_module else str(REPOSITORY / "launch" / f"{program}.py")
    script = SIGNALLED.format(
        module=module, number=int(signal.SIGINT), words=[first, *arguments],
        run="run_module" if is_module else "run_path",
        options={"alter_sys": True} if is_module else {},
    )  # fmt: skip
    done = python("-c", script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr == "SIGINT: stopped while starting; nothing was done\n"


def test_whatever_a_library_makes_of_a_signal_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Some turn the exception that a handler raises into one of their own."""
    stop = StopRequest()

    def work(arguments: list[str], stop: StopRequest) -> int:
        stop.where = "while weighing"
        try:
            stop._handle(signal.SIGTERM, None)
        except Stopped as stopped:
            raise ImportError("initialization failed") from stopped
        return 0

    assert cli._exit_code(work, stop) == 130
    assert capsys.readouterr().err == "SIGTERM: stopped while weighing\n"


LINES = """
import logging, sys
from shards.command import end, open_output
open_output()
logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])
for number in range(3):
    logging.warning("3 × 4 … %d", number)
    print("Größe", flush=True)
end({code})
"""


@pytest.mark.parametrize("code", [0, 1])
def test_the_work_goes_on_when_the_reader_has_gone(tmp_path: Path, code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-c", LINES.format(code=code)], stdout=write, stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )  # fmt: skip
    os.close(write)
    assert process.communicate(timeout=30)[1] == b"" and process.returncode == code


def test_lines_that_find_no_room_are_an_error_at_the_end(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", LINES.format(code=0)], stdout=full, stderr=subprocess.PIPE,
            cwd=REPOSITORY, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_any_encoding_takes_any_sign(tmp_path: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", LINES.format(code=0)], capture_output=True,
                          cwd=REPOSITORY, env=environment)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Größe".encode(encoding, "backslashreplace") in done.stdout
    assert "3 × 4 … 2".encode(encoding, "backslashreplace") in done.stdout


def test_the_table_of_keys_takes_any_encoding_too(tmp_path: Path) -> None:
    done = python("-m", "dan_dist.keys", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and r"number \u2265 0" in done.stdout


@pytest.mark.parametrize("program", ["verify", "show", "pack"])
def test_commands_on_shards_end_with_their_code_without_a_reader(
    shards: Path, tmp_path: Path, program: str
) -> None:
    arguments = {"verify": [shards], "show": [shards, "--images", "2"],
                 "pack": ["folder", "--source", tmp_path / "nowhere", "--out", shards]}  # fmt: skip
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", f"shards.{program}", *map(str, arguments[program])], stdout=write,
        stderr=subprocess.PIPE, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    )  # fmt: skip
    os.close(write)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (2 if program == "pack" else 0), errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/data/x.pt"), "/data/x.pt: No space left on devi"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (BlockingIOError("the folder is in use"), "the folder is in use"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("two\n  lines"), "two lines"),
        (ValueError("key '\x1b[31m\udc80'"), r"key '\x1b[31m\udc80'"),
        (FileNotFoundError(2, "No such file", "a\nb\x07"), r"a\nb\x07: No such file"),
    ],
)
def test_an_error_in_words(error: Exception, line: str) -> None:
    assert words(error).startswith(line) and words(error).isprintable()


def test_an_account_without_a_home_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(user: int) -> None:
        raise KeyError(user)

    give_home()  # an account in the list of users keeps what it has
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("LOGNAME", raising=False)
    give_home()
    assert Path(os.environ["HOME"]).is_dir() and os.environ["LOGNAME"] == str(os.getuid())
    Path(os.environ["HOME"]).rmdir()


def refused(*words: str) -> str:
    """The reason with which a training's command line is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        programs._train(list(words), StopRequest())
    return str(caught.value)


def test_a_refused_configuration_leaves_its_reason_in_the_folder(tmp_path: Path) -> None:
    reason = refused("train.output=runs/a", "trian.epochs=3")
    found = outcome(tmp_path / "runs/a")
    assert (found["status"], found["step"]) == ("failed", None)
    assert found["reason"] == reason and "unknown key 'trian'" in reason
    Path("own.yaml").write_text("train: {output: runs/b, epochs: many}\n")
    assert outcome_of("runs/b", "own.yaml")["reason"].startswith("own.yaml: ")
    assert "--epochs" in outcome_of("runs/c", "--epochs", "3", "train.output=runs/c")["reason"]
    Path("broken.yaml").write_text("train: {output: runs/d")
    refused("broken.yaml")  # cannot be read, so neither can its folder
    refused("nowhere.yaml")
    assert sorted(p.name for p in Path("runs").iterdir()) == ["a", "b", "c"]


def outcome_of(folder: str, *words: str) -> dict:
    refused(*words)
    return outcome(Path(folder))


def test_a_run_that_must_be_kept_keeps_its_outcome() -> None:
    folder = Path("run")
    folder.mkdir()
    write_outcome(folder, "finished", step=7, reason="all steps done")
    assert outcome_of("run", "train.output=run", "x.y=1")["status"] == "finished"
    write_outcome(folder, "preempted", step=7, reason="SIGTERM")
    with locked(folder, "taken"):  # another training's
        assert outcome_of("run", "train.output=run", "x.y=1")["status"] == "preempted"
    assert outcome_of("run", "train.output=run", "x.y=1")["status"] == "failed"


def test_torchruns_summary_holds_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def work(arguments: list[str], stop: StopRequest) -> int:
        raise ValueError("data.shards: nothing at https://user:secret-word@host/x")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert cli._exit_code(work, StopRequest()) == 2
    line = "data.shards: nothing at https://***@host/x"
    assert capsys.readouterr().err == f"error: {line}\n"
    report_failure("what followed from it")  # the first reason stands
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    summary = str(ChildFailedError("train.py", {0: failure}))
    assert f"traceback : {line}\n" in summary and "followed" not in summary


@pytest.mark.parametrize(
    ("text", "line"), [("odd", "rank 1: odd"), ("rank 2 on vm: odd", "rank 2 on vm: odd")]
)
def test_a_line_names_a_rank_once(
    text: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "RANK_0_FIRST_S", 0.0)
    assert cli._fail(ValueError(text), StopRequest(), rank=1) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


FULL = """
import sys
from pathlib import Path
from dan_dist.run.outcome import keep_room, open_outcome, write_outcome
folder = Path("disk")
{before}
try:
    with (folder / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096)); file.flush()
except OSError:
    pass
for number in range(100):
    try:
        (folder / f"inode-{{number}}").touch()
    except OSError:
        break
write_outcome(folder, "failed", step=3, reason="ü" * 5000)
print((folder / "outcome.json").read_text())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.parametrize(
    "before",
    ["keep_room(folder); open_outcome(folder)",
     "write_outcome(folder, 'preempted', step=2, reason='x')"],
)  # fmt: skip
def test_a_disk_without_a_byte_or_an_inode_takes_the_outcome(tmp_path: Path, before: str) -> None:
    (tmp_path / "disk").mkdir()
    command = f'mount -t tmpfs -o size=64k,nr_inodes=12 tmpfs disk && {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command, FULL.format(before=before)], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["status"], found["step"]) == ("failed", 3)
    assert {*found["reason"]} == {"ü"} and 1900 < len(found["reason"]) < 2048  # of two bytes each


def test_the_outcome_holds_the_signs_of_any_language(tmp_path: Path) -> None:
    reason = 'train.größe is "7": expected ≤ 5\udcff'
    write_outcome(tmp_path, "failed", step=None, reason=reason)
    text = (tmp_path / "outcome.json").read_text(encoding="utf-8")
    assert r'größe is \"7\": expected ≤ 5\udcff"' in text and outcome(tmp_path)["reason"] == reason


def test_a_disk_that_is_full_from_the_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        keep_room(tmp_path)
    assert words(caught.value).startswith(f"{tmp_path}: No space left on device")
    monkeypatch.undo()
    keep_room(tmp_path)
    assert (tmp_path / RESERVE).stat().st_size == 4096


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_a_complete_set_is_packed_again_without_a_byte(
    faces: ShardSet, tmp_path: Path, disk: str
) -> None:
    """Nothing is left to write; nor to draw, where the contact sheet is there."""
    from trees import tree

    tree(tmp_path / "source")
    words = ["-m", "shards.pack", "folder", "--source", "source", "--size", "32", "--workers", "1",
             "--out", "disk/out"]  # fmt: skip
    pack = f"PYTHONPATH={REPOSITORY} {sys.executable} {' '.join(words)}"
    spoil = {"full": "head -c 9m /dev/zero >disk/filler", "read-only": "mount -o remount,ro disk"}
    (tmp_path / "disk").mkdir()
    command = (f"mount -t tmpfs -o size=4m tmpfs disk; {pack} >/dev/null 2>&1 || exit 9; "
               f"{spoil[disk]} 2>/dev/null; {pack}")  # fmt: skip
    done = subprocess.run(["unshare", "-m", "bash", "-c", command], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done
    assert done.stdout.rstrip().endswith("packed into disk/out") and "error" not in done.stderr
