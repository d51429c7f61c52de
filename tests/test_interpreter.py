"""A program that stands in for Python ends, prints and dies as the process forked for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from interpreter import forked, python

from conftest import REPOSITORY, run, until

SCRIPT = """
import os, signal, sys, time
print(sys.argv[1:], os.getcwd(), os.environ["WORD"], "torch" in sys.modules, __name__, flush=True)
if sys.argv[1] == "sleep":
    time.sleep(60)
if sys.argv[1] == "signal":
    os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "raise":
    raise RuntimeError("of the script")
sys.exit(sys.argv[1] if sys.argv[1] == "words" else int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORD", "of the test")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("0", 0, ""),
        ("3", 3, ""),
        ("words", 1, "words\n"),
        ("raise", 1, "RuntimeError: of the script\n"),
        ("signal", -signal.SIGTERM, ""),
    ],
)
def test_it_ends_as_the_script_ends(script: Path, word: str, code: int, said: str) -> None:
    done = run(sys.executable, script, word, cwd=script.parent)
    assert done.returncode == code and done.stderr.endswith(said)
    assert done.stdout == f"['{word}'] {script.parent} of the test True __main__\n"


def test_modules_and_real_pythons(tmp_path: Path) -> None:
    assert "usage: " in run(sys.executable, "-m", "shards.verify", "-h", cwd=tmp_path).stdout
    fresh = run(sys.executable, "-c", "import sys; print('torch' in sys.modules)", cwd=tmp_path)
    assert fresh.stdout == "False\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_reaches_the_forked_process(script: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [python(), script, "sleep"], cwd=script.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
    )  # fmt: skip
    until(process, "of the test")
    work = psutil.Process(forked(process.pid))
    assert work.pid != process.pid
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number
    deadline_s = time.monotonic() + 10
    while work.is_running() and work.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_it_sees_the_disks_of_the_program(script: Path) -> None:
    disk = script.parent / "disk"
    disk.mkdir()
    script.write_text("import pathlib, sys; print(pathlib.Path('disk/word').read_text(), "
                      "'torch' in sys.modules)")  # fmt: skip
    command = f"mount -t tmpfs tmpfs disk && echo there >disk/word && {python()} {script}"
    done = run("unshare", "-m", "sh", "-c", command, cwd=script.parent)
    assert done.stdout == "there\n True\n", done.stderr
    assert not list(disk.iterdir())
