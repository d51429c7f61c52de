"""A run that is asked to stop: before training, in it, twice."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import SCRIPT, outcome, single, start, until
from dan_dist import train as story
from dan_dist.config import load_config
from dan_dist.engine.ddp import Engine
from dan_dist.run.folder import step_path
from dan_dist.run.signals import Stopped, StopRequest

Write = Callable[[str], Path]


@pytest.mark.slow
def test_a_run_without_a_launcher_ends_with_its_own_exit_code(tiny: Write, tmp_path: Path) -> None:
    process = start(SCRIPT, tiny("run"), "train.epochs=200", cwd=tmp_path)
    until(process, "step 5 ")
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 75, printed
    found = outcome(tmp_path / "run")
    assert found["status"] == "preempted" and found["reason"].startswith("SIGTERM")
    assert f"of step {found['step']}; the same command resumes from there" in printed
    assert step_path(tmp_path / "run", found["step"]).exists()


def test_a_signal_before_training_ends_it_at_once(tiny: Write, tmp_path: Path) -> None:
    process = start(SCRIPT, tiny("run"), cwd=tmp_path, interpreter=sys.executable)
    time.sleep(1.0)  # torch is being imported
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 130
    assert process.stdout is not None and "SIGUSR1: stopped while starting" in process.stdout.read()
    assert not (tmp_path / "run").exists()
    (tmp_path / "stop").touch()  # a launcher's, whose signal came before anybody listened
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAN_STOP_FILE", str(tmp_path / "stop"))
        assert start(SCRIPT, tiny("run"), cwd=tmp_path).wait(30) == 130
    stop, load = StopRequest(), Engine.load_state
    single(tiny("run"), "train.max_steps=1")

    def stopped(engine: Engine, state: dict) -> None:
        load(engine, state)
        stop._handle(signal.SIGUSR1, None)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Engine, "load_state", stopped)
        story.main(load_config(tiny("run"), ["train.max_steps=2"]), stop)
    found = outcome(tmp_path / "run")
    assert (found["status"], found["step"]) == ("preempted", None)


def test_a_second_signal_ends_it_at_once(tiny: Write, tmp_path: Path) -> None:
    """A process that never gets to its next step: the first signal has no effect."""
    script = tmp_path / "stuck.py"
    script.write_text(
        "import time\nfrom dan_dist.run.signals import StopRequest\nrequest = StopRequest()\n"
        "request.install()\nrequest.wait_for_step = True\nprint('ready', flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    process = start(script, cwd=tmp_path)
    until(process, "ready")
    for _ in range(2):  # the second comes from a launcher that passes on the first
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
