"""What a run survives, piece by piece; tests/chaos.py has the whole."""

import _thread
import errno
import json
import logging
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import chaos
import psutil
import pytest
import torch
from torch.distributed import HashStore

from conftest import DAN, REPOSITORY, run
from dan_dist import checkpoint, engine, pulse, tracking
from dan_dist import model as networks
from dan_dist import train as story
from dan_dist.augment import Augment
from dan_dist.config import load_config
from dan_dist.data import Batch, Reader, TooMuchDamageError, TrainOrder, train_stream
from dan_dist.engine import Engine
from dan_dist.journal import Journal, read_records, read_sent
from dan_dist.losses import Objective
from dan_dist.pulse import Pulse
from dan_dist.shardset import ShardSet, open_shardset
from dan_dist.stop import Stopped, StopRequest
from dan_dist.world import World, _meet

Write = Callable[[str], Path]
SCRIPT = str(REPOSITORY / "launch" / "train.py")


def single(config: Path, *overrides: str) -> story.Ended:
    return story.main(load_config(config, overrides))


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def history(uri: str, key: str = "train/loss") -> list[tuple[int, float]]:
    """The points of the one run that MLflow holds."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("dan_dist").experiment_id])
    return [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, key)]


def start(*command: str | Path, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], words: str, timeout_s: float = 90) -> str:
    """Reads what a process prints up to a line with `words`."""
    assert process.stdout is not None
    seen, timer = "", threading.Timer(timeout_s, process.kill)
    timer.start()
    for line in process.stdout:
        seen += line
        if words in line:
            timer.cancel()
            return seen
    timer.cancel()
    raise AssertionError(f"'{words}' was not said:\n{seen}")


def test_chaos_in_short(tmp_path: Path) -> None:
    """Some of the kinds, and the comparison with the undisturbed run, bit for bit."""
    kinds = ["sigkill_rank", "sigkill_all", "sigusr1", "corrupt_checkpoint", "truncate_shard"]
    tallies = chaos.run(tmp_path, 3, random.randrange(10**6), kinds)
    assert sum(t.injected for t in tallies.values()) >= 2


def test_stopped_alone_it_says_so_by_its_exit_code(tiny: Write, tmp_path: Path) -> None:
    process = start(SCRIPT, tiny("run"), "train.epochs=200", cwd=tmp_path)
    until(process, "step 5 ")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    found = outcome(tmp_path / "run")
    assert found["status"] == "preempted" and found["reason"].startswith("SIGTERM")
    assert f"of step {found['step']}; the same command goes on from there" in said
    assert checkpoint.step_path(tmp_path / "run", found["step"]).exists()


def test_a_signal_before_training_ends_it_at_once(tiny: Write, tmp_path: Path) -> None:
    process = start(SCRIPT, tiny("run"), cwd=tmp_path)
    time.sleep(1.0)  # torch is being imported
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 130
    assert process.stdout is not None and "SIGUSR1: stopped before" in process.stdout.read()
    assert not (tmp_path / "run").exists()
    (tmp_path / "stop").touch()  # a launcher's, whose signal came before anybody listened
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAN_STOP_FILE", str(tmp_path / "stop"))
        assert start(SCRIPT, tiny("run"), cwd=tmp_path).wait(30) == 130
    stop, wait = StopRequest(), Engine.load_state
    single(tiny("run"), "train.max_steps=1")

    def stopped(engine: Engine, state: dict) -> None:
        wait(engine, state)
        stop._handle(signal.SIGUSR1, None)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Engine, "load_state", stopped)
        story.main(load_config(tiny("run"), ["train.max_steps=2"]), stop)
    found = outcome(tmp_path / "run")
    assert (found["status"], found["step"]) == ("preempted", None)


def test_a_second_signal_ends_it_at_once(tiny: Write, tmp_path: Path) -> None:
    """A process that never gets to its next step: the first signal cannot be heeded."""
    script = tmp_path / "stuck.py"
    script.write_text(
        "import time\nfrom dan_dist.stop import StopRequest\nrequest = StopRequest()\n"
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


def test_a_damaged_checkpoint_is_passed_over(
    tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = single(tiny("whole")).metrics
    single(tiny("run"), "train.max_steps=10", "train.checkpoint_every=5")
    path = checkpoint.step_path(tmp_path / "run", 10)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # torch.load would not notice
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000010\.pt: .*does not have its checksum"):
        checkpoint.load(path)
    assert single(tiny("run")).metrics == whole
    assert "trying the one before" in caplog.text


def test_checkpoints_that_cannot_be_read_are_kept(
    tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    options = ["train.checkpoint_every=2", "train.keep_checkpoints=9"]
    single(tiny("run"), *options, "train.max_steps=6")
    (folder / "step-00000009.pt.partial").write_text("of a killed run")
    lacking = checkpoint.load(checkpoint.step_path(folder, 6))
    del lacking["config"]
    torch.save(lacking, checkpoint.step_path(folder, 6))
    checkpoint.step_path(folder, 8).mkdir()
    with pytest.raises(ValueError, match=r"not a readable checkpoint .it lacks config"):
        checkpoint.load(checkpoint.step_path(folder, 6))
    assert single(tiny("run"), *options, "train.max_steps=5").status == "finished"
    assert "step-00000008.pt cannot be read: Is a directory; trying the one before" in caplog.text
    names = {p.name for p in folder.iterdir()}
    assert {"step-00000006.pt.damaged", "step-00000008.pt.damaged"} <= names
    assert outcome(folder)["step"] == 5 and not list(folder.glob("*.partial"))
    assert not list(folder.glob("outcome.json.*"))
    for path in checkpoint.steps_saved(folder)[1:]:
        path.unlink()
    own = checkpoint.step_path(folder, 5)
    foreign = {**checkpoint.load(own), "format": "dan_dist checkpoint, version 2"}
    torch.save(foreign, own)
    with pytest.raises(ValueError, match="not a checkpoint of this project, expected"):
        single(tiny("run"), *options)
    own.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"none of its checkpoints can be read .step-00000005\.pt"):
        single(tiny("run"), *options)
    assert own.read_bytes() == b"PK"


def test_all_ranks_go_on_from_what_one_has_chosen(tiny: Write, tmp_path: Path) -> None:
    """A node that sees other files, or older ones, must not go on from them."""
    config = load_config(tiny("run"), [])
    single(tiny("run"), "train.max_steps=10", "train.checkpoint_every=5")
    newest, older = checkpoint.steps_saved(tmp_path / "run")
    chosen = story.choose(config)
    assert chosen == str(newest)
    newest.unlink()
    with pytest.raises(OSError, match=r"step-00000010\.pt cannot be read: No such file"):
        story.resume(config, None, None, chosen)  # type: ignore[arg-type]
    newest.write_bytes(older.read_bytes())
    with pytest.raises(ValueError, match=r"step-00000010\.pt is of step 5"):
        story.resume(config, None, None, chosen)  # type: ignore[arg-type]


def test_the_best_checkpoint_is_there_whenever_another_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written, save = list[str](), checkpoint.save

    def dying(path: Path, content: Any) -> None:
        if content["step"] == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, content)
        written.append(f"{path.name} {content['best']}")

    monkeypatch.setattr(checkpoint, "save", dying)
    writer = checkpoint.Writer(tmp_path, keep=2, stop_on_error=False)
    writer.write(5, {"step": 5, "best": 1, "optimizer": {}}, is_best=True)
    writer.write(10, {"step": 10, "best": 2, "optimizer": {}}, is_best=True)
    writer.wait()
    assert writer.saved == 5 and "the one before stays" in caplog.text
    monkeypatch.setattr(checkpoint, "save", lambda p, c: written.append(f"{p.name} {c['best']}"))
    writer.write(15, {"step": 15, "best": 2, "optimizer": {}}, is_best=False)
    writer.wait()
    writer.close()
    assert written == [
        "best.pt 1", "step-00000005.pt 1", "best.pt 2", "step-00000015.pt 2"
    ]  # fmt: skip
    assert writer.saved == 15


def test_a_longer_run_can_be_ended_at_its_checkpoint(tiny: Write, tmp_path: Path) -> None:
    """In mid-epoch, without evaluation: as one that was to end there from the start."""
    whole = single(tiny("whole"), "train.max_steps=7").metrics
    single(tiny("run"), "train.checkpoint_every=7", "train.keep_checkpoints=9")
    for path in checkpoint.steps_saved(tmp_path / "run")[:-1]:
        path.unlink()
    assert single(tiny("run"), "train.max_steps=7").metrics == whole
    assert outcome(tmp_path / "run")["step"] == 7


class Executes:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch executed",))


def test_loading_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": Executes()}, tmp_path / "own.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Executes()))
    for name in ("own.pt", "plain.pt"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_costs_a_checkpoint_and_no_more(
    tiny: Write, tmp_path: Path, policy: str
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = (
        f"train.output={disk}/run train.checkpoint_every=4 train.checkpoint_errors={policy} "
        f"tracking.enabled={policy == 'continue'}"
    )
    # Room for the first checkpoint and the best one; then a file takes what is left.
    command = (
        f"mount -t tmpfs -o size=700m tmpfs {disk}; {sys.executable} {SCRIPT} {tiny('run')} "
        f"{options} train.max_steps=4; head -c 1G /dev/zero > {disk}/filler; "
        f"{sys.executable} {SCRIPT} {tiny('run')} {options} train.max_steps=14; echo code $?; "
        f"ls {disk}/run; cat {disk}/run/outcome.json; rm {disk}/filler; "
        f"{sys.executable} {SCRIPT} {tiny('run')} {options}"
    )
    done = run("unshare", "-m", "sh", "-c", command, cwd=tmp_path, timeout_s=200)
    between = done.stdout.split("code ")[1].split("resumed")[0]
    assert "step-00000004.pt" in between and "partial" not in between, done.stdout + done.stderr
    assert "resumed after step 4" in done.stdout.split("code ")[1]
    assert "finished after 20 steps" in done.stdout
    assert between.startswith("2") and '"status": "failed"' in between, between
    if policy == "stop":
        assert "error: no checkpoint could be written" in done.stderr
        return
    assert "the one before stays, training goes on" in done.stdout and "step 14 loss" in done.stdout
    assert '"failed", "step": 4, "reason": "all 14 steps' in between, between
    assert "error: all 14 steps are done, but the last checkpoint" in done.stderr
    assert "journal.jsonl: No space left on device; what it is to hold waits" in done.stdout
    points = history(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [step for step, _ in points] == list(range(1, 21))


def test_a_rank_that_hangs_ends_the_job_and_is_named(tiny: Write, tmp_path: Path) -> None:
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT,
                    tiny("run"), "train.epochs=500", "train.timeout_s=8", cwd=tmp_path)  # fmt: skip
    try:
        until(process, "step 3 ")
        own = psutil.Process(process.pid).children(recursive=True)
        victim = next(p for p in own if p.environ().get("RANK") == "1")
        victim.suspend()
        began = time.monotonic()
        said = until(process, "error: ")
        assert "rank 1 on " in said.splitlines()[-1] and "is silent for 8 s" in said
        assert time.monotonic() - began < 60
        assert outcome(tmp_path / "run")["status"] == "failed"
        victim.resume()  # as torchrun would after 30 s, by SIGKILL
        process.communicate(timeout=60)
        assert process.returncode != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


FAULTY = """
import os, runpy, signal, sys, time
from dan_dist import data, engine

def hang(): time.sleep(600)
def die(): os.kill(os.getpid(), signal.SIGKILL)
def fail(): raise data.TooMuchDamageError("train-00.tar: broken")

following, count = data.Stream.__next__, 0
def faulty(self):
    global count
    count += self.augment is None
    if count == AT:
        FAULT()
    return following(self)

if os.environ["RANK"] == "1":
    data.Stream.__next__ = faulty
sys.argv[:1] = [SCRIPT]
runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.mark.parametrize("fault", ["hang", "die", "fail"])
def test_a_rank_is_lost_in_evaluation(tiny: Write, tmp_path: Path, fault: str) -> None:
    """In the second one: the first may take its time, as it may compile."""
    script = tmp_path / "faulty.py"
    text = FAULTY.replace("AT", "2").replace("FAULT()", f"{fault}()")
    script.write_text(text.replace("SCRIPT", repr(SCRIPT)))
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               script, tiny("run"), "train.timeout_s=8", cwd=tmp_path)  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(ours) == 1, done.stderr
    words = {
        "hang": r"rank 1 on \S+ \(evaluation step 1\) does not go on for 8 s",
        "die": r"rank 1 on \S+ \(.*step \d+\) has ended or hangs",
        "fail": r"train-00\.tar: broken",
    }[fault]
    assert re.search(words, ours[0]), ours
    assert "Stopped" not in done.stderr
    found = outcome(tmp_path / "run")
    assert found["status"] == "failed" and found["step"] == 20
    assert re.search(words, found["reason"]), found


def test_a_signal_to_the_rank_that_works_for_all_ends_all(tiny: Write, tmp_path: Path) -> None:
    faces = "data.synthetic={train: 200000, val: 8, size: 64}"
    process = start(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, tiny("run"),
        faces, f"data.shards={tmp_path / 'new'}", cwd=tmp_path,
    )  # fmt: skip
    try:
        until(process, "drawing 200008 faces")
        own = psutil.Process(process.pid).children()
        next(p for p in own if p.environ().get("RANK") == "0").send_signal(signal.SIGUSR1)
        began = time.monotonic()
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and time.monotonic() - began < 30, said
        assert "SIGUSR1: stopped before or after the work" in said and "Traceback" not in said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the lines of pulses that end their process, which here goes on."""
    lines: list[str] = []
    for name, value in {"BEAT_S": 0.02, "SILENT_S": 0.3, "YIELD_S": 0.0}.items():
        monkeypatch.setattr(pulse, name, value)
    monkeypatch.setattr(pulse.os, "_exit", lambda code: _thread.exit())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    yield lines
    for own in PULSES:  # whose end would be that of the next test
        own._ended.set()
        own._threads[1].join(5)  # the other may stand in a store that hangs
    PULSES.clear()


PULSES: list[Pulse] = []  # those of the test that runs


def pulses_of(store: Any, size: int, ended: list[str], timeout_s: float = 1.0) -> list[Pulse]:
    pulses = [Pulse(store, r, size, timeout_s=timeout_s, on_loss=ended.append) for r in range(size)]
    PULSES.extend(pulses)
    return pulses


def test_a_rank_that_does_not_go_on_is_named(ended: list[str]) -> None:
    """All give signs of life, but one never gets its images of step 3."""
    pulses = pulses_of(HashStore(), 3, ended)
    for step in (1, 2, 3):
        for own in pulses:
            own.advance(f"step {step}, reading")
        for rank, own in enumerate(pulses):
            if (rank, step) != (1, 3):
                own.advance(f"step {step}")
        time.sleep(0.1)
    time.sleep(2.0)
    assert len(ended) == 1
    assert ended[0].startswith("rank 1 on ") and "(step 3, reading) does not go on" in ended[0]


def test_slow_but_steady_ranks_are_left_alone(ended: list[str]) -> None:
    pulses = pulses_of(HashStore(), 2, ended, timeout_s=0.5)
    time.sleep(0.8)  # before the first step there is no deadline
    pulses[0].advance("step 1", patient=True)
    pulses[1].advance("step 1")
    time.sleep(0.8)  # one of them compiles
    for step in range(5):
        for own in pulses:
            own.advance(f"step {step}")
        time.sleep(0.3)
    for step in range(4):  # rank 0 is through with its part of the evaluation and waits
        pulses[1].advance(f"evaluation step {step}")
        time.sleep(0.3)
    pulses[1].close()  # from here on nothing is done together
    time.sleep(1.0)
    for own in pulses:
        own.close()
    assert not ended


class HangingStore:
    """That of a process that is stopped: it neither answers nor fails."""

    def __init__(self) -> None:
        self.store, self.hangs = HashStore(), False

    def __getattr__(self, name: str) -> Any:
        if self.hangs:
            time.sleep(3600)
        return getattr(self.store, name)


@pytest.mark.parametrize("fault", ["store hangs", "silent while compiling", "disk fails"])
def test_what_has_no_step_to_wait_for_ends_as_well(
    ended: list[str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, store = threading.Event(), HangingStore()
    monkeypatch.setattr(pulse.os, "_exit", lambda code: (gone.set(), _thread.exit()))

    def fail(line: str) -> None:
        ended.append(line)
        raise OSError(errno.ENOSPC, "full")

    pulses = pulses_of(store, 2, ended)
    pulses[0]._on_loss = fail if fault == "disk fails" else ended.append
    for own in pulses:
        own.advance("step 1", patient=fault == "silent while compiling")
    time.sleep(0.2)
    if fault == "store hangs":
        store.hangs = True
    else:
        pulses[1]._ended.set()  # dies without a word
        for thread in pulses[1]._threads:
            thread.join()
        pulses[1]._state = "works"
    assert gone.wait(5)
    expected = "the store of the job" if fault == "store hangs" else "rank 1 on "
    assert ended[0].startswith(expected), ended


@pytest.mark.parametrize("way", ["stopped", "failed", "silent"])
def test_ranks_that_wait_notice_one_that_has_left(ended: list[str], way: str) -> None:
    """Rank 0 is at something long that it does for all."""
    store = HashStore()
    pulses = pulses_of(store, 2, ended)
    time.sleep(0.2)
    if way == "silent":
        pulses[0]._ended.set()
        for thread in pulses[0]._threads:
            thread.join()
    elif way == "failed":
        pulses[0].leave("failed", "rank 0 on here: no space")
    else:
        pulses[0].leave("stopped", "SIGUSR1")
    device = torch.device("cpu")
    worlds = [World(1, 1, 2, 2, device, store, check=pulses[1].check) for _ in range(2)]
    kind: type[BaseException] = Stopped if way == "stopped" else ConnectionError
    words = {"stopped": "SIGUSR1", "failed": "no space", "silent": "rank 0 on "}[way]
    with pytest.raises(kind, match=words):
        worlds[0].once(lambda: None)
    with pytest.raises(kind, match=words):
        worlds[1].together(lambda: None)
    pulses[1].close()
    # Of a rank that is silent the pulse itself may be the first to tell.
    assert way == "silent" or not ended
    assert all("rank 0 on " in line for line in ended)


def test_a_failure_of_one_rank_is_that_of_all() -> None:
    store, found = HashStore(), dict[int, str]()

    def work(rank: int, failing: tuple[int, ...]) -> None:
        def task() -> None:
            if rank in failing:
                raise ValueError(f"bad {rank}")

        try:
            worlds[rank].together(task)
        except ValueError as error:
            found[rank] = str(error)

    worlds = [World(r, r, 3, 3, torch.device("cpu"), store) for r in range(3)]
    for failing, expected in (((), []), ((1,), ["rank 1 on "] * 3), ((0, 1, 2), ["bad 0"] * 3)):
        found.clear()
        threads = [threading.Thread(target=work, args=(r, failing)) for r in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == len(expected)
        assert all(found[r].startswith(text) for r, text in enumerate(expected)), found
    assert [worlds[r].tally("damaged", i) for r, i in ((0, 5), (1, 5), (2, 6))] == [1, 1, 2]


def test_ranks_meet_whatever_an_earlier_gathering_left(ended: list[str]) -> None:
    store = HashStore()
    names: list[str] = []
    for size in (3, 2, 3):
        found: dict[int, str] = {}
        order = random.sample(range(size), size)

        def join(rank: int, size: int = size, found: dict[int, str] = found) -> None:
            found[rank] = _meet(store, rank, size)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(20)
        assert len(found) == size and len(set(found.values())) == 1
        names += set(found.values())
    assert len(set(names)) == 3


@pytest.mark.parametrize("victim", ["worker", "node"])
def test_an_elastic_job_goes_on_without_the_dead(tiny: Write, tmp_path: Path, victim: str) -> None:
    """Two nodes of one rank each under torchrun's own restarts."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tiny("run")
    options = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1",
               "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=job", "--local-addr",
               "127.0.0.1", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf",
               "last_call_timeout=5,join_timeout=60", SCRIPT, config, "train.epochs=4",
               "train.checkpoint_every=3"]  # fmt: skip
    nodes = [start(*options, cwd=tmp_path)]
    time.sleep(1)
    nodes.append(start(*options, cwd=tmp_path))
    try:
        # Rank 0 prints, on whichever node it is.
        texts = ["", ""]
        readers = [threading.Thread(target=follow, args=(n, texts, k)) for k, n in enumerate(nodes)]
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + 90
        while "step 8 " not in "".join(texts) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "step 8 " in "".join(texts), texts
        if victim == "worker":
            psutil.Process(nodes[1].pid).children()[0].kill()
        else:
            family = psutil.Process(nodes[1].pid).children(recursive=True)
            for process in [nodes[1], *family]:
                process.kill()
        nodes[0].wait(150)
        readers[0].join(10)
        said = "".join(texts)
        assert "resumed after step" in said and "finished after 40 steps" in said, said
        assert outcome(tmp_path / "run")["status"] == "finished"
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)


def follow(process: subprocess.Popen[str], texts: list[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        texts[number] += line


def test_a_journal_forgets_a_torn_line_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("run", uri="x")
    journal.append("metrics", values={"a": 1.0}, step=1)
    with pytest.raises(OSError, match="in use by another process"):
        Journal(tmp_path)
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "metr')
    again = Journal(tmp_path)
    assert again.id == journal.id and again.opened and again.uri == "x"
    assert [r["kind"] for r in again.pending] == ["run", "metrics"]
    assert again.new_metrics({"a": 2.0, "b": 3.0}, 1) == {"b": 3.0}
    again.acknowledge()
    again.append("metrics", values={"a": 4.0}, step=2)
    again.close()
    assert [r.get("step") for r in Journal(tmp_path).pending] == [1, 2]
    (tmp_path / "journal.jsonl").write_text("{}\nno json\n{}\n")
    with pytest.raises(ValueError, match=r"journal\.jsonl is damaged"):
        Journal(tmp_path)


def test_a_server_that_was_away_is_told_everything_once(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    options = ["tracking.enabled=true", "train.max_steps=6"]
    assert single(tiny("run"), *options).status == "finished"
    assert caplog.text.count("failed, its journal grows") == 1
    assert f"python -m dan_dist.tracking replay {tmp_path / 'run'}" in caplog.text
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "dan_dist.tracking", "replay", str(tmp_path / "run")]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for expected in (True, False):  # a second time there is nothing left to send
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0 and ("0 records" not in done.stdout) == expected, done.stderr
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("dan_dist").experiment_id])
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [p.step for p in points] == [1, 2, 3, 4, 5, 6]
    assert found.info.status == "FINISHED"
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert artifacts >= {"config.yaml", "confusion_matrix.png"}
    (model,) = found.outputs.model_outputs
    assert client.get_logged_model(model.model_id).status == "READY"


def test_what_is_told_does_not_depend_on_interruptions(tiny: Write, tmp_path: Path) -> None:
    options = ["tracking.enabled=true", "train.log_every=5", "train.max_steps=10"]
    single(tiny("whole"), *options)
    single(tiny("parts"), *options, "train.max_steps=3")
    single(tiny("parts"), *options, "train.max_steps=8", "train.checkpoint_every=4")
    single(tiny("parts"), *options)

    def told(name: str) -> list[Any]:
        records = [r for r in read_records(tmp_path / name) if r["kind"] == "metrics"]
        kept = [(r["step"], r["values"]) for r in records]
        return [(step, v["train/loss"], v["train/gradient_norm"]) for step, v in kept
                if "train/loss" in v]  # fmt: skip

    assert [step for step, *_ in told("whole")] == [5, 10]
    assert told("parts") == told("whole")


class FullDisk(FileIO):
    """Takes 9 bytes."""

    def write(self, data: Any) -> int:
        return super().write(data[:9])


def test_a_journal_waits_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.append("run", uri="x")
    whole = journal._file
    journal._file = FullDisk(tmp_path / "journal.jsonl", "ab+")
    for step in (1, 2):
        journal.append("metrics", values={"a": 1.0}, step=step)
    assert caplog.text.count("what it is to hold waits") == 1
    assert [r["kind"] for r in journal.pending] == ["run"]  # nothing is sent before it is kept
    assert [r["kind"] for r in read_records(tmp_path)] == ["journal", "run"]
    journal._file = whole
    journal.append("rollback", step=1)
    assert journal.new_metrics({"a": 5.0}, 1) == {} and journal.new_metrics({"a": 5.0}, 2)
    journal.append("metrics", values={"a": 5.0}, step=2)
    journal.close()
    found = [(r["step"], r["values"]["a"]) for r in read_records(tmp_path) if "values" in r]
    assert found == [(1, 1.0), (2, 5.0)]  # of step 2, what was computed anew


def test_journals_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They name files that are not theirs or gone, a server, what MLflow refuses; they are lost."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "secret").write_text("secret")
    journal = Journal(tmp_path / "run")
    journal.append(
        "run", experiment="dan_dist", name="n", parent=None, uri="http://127.0.0.1:9",
        artifacts=f"file:{tmp_path}/stolen", params={}, config={}, time_ms=5,
    )  # fmt: skip
    for path in ("../secret", "figures/gone.png"):
        journal.append("artifact", path=path, folder="")
    journal.append("metrics", values={"bad\nname": 1.0}, step=1, time_ms=6)
    journal.append("metrics", values={"train/loss": 1.0}, step=1, time_ms=6)
    journal.close()
    with pytest.raises(ValueError, match=r"begun in the store http://127\.0\.0\.1:9; to send it"):
        tracking.replay(tmp_path / "run")
    assert tracking.replay(tmp_path / "run", uri) == 5
    assert "../secret lies outside" in caplog.text and "gone.png is not there" in caplog.text
    assert caplog.text.count("left out of MLflow") == 3
    assert history(uri) == [(1, 1.0)] and not (tmp_path / "stolen").exists()
    assert not list((tmp_path / "mlruns").rglob("secret"))
    run_id = read_sent(tmp_path / "run")[1]
    (tmp_path / "run" / "journal.jsonl").unlink()
    tracker = tracking.MlflowTracker(
        tmp_path / "run", run_id=run_id, experiment="dan_dist", run_name=None, parent=None,
        params={}, tags={}, config={},
    )  # fmt: skip
    tracker.metrics({"train/loss": 2.0}, 2)
    tracker.end("FINISHED")
    assert history(uri) == [(1, 1.0), (2, 2.0)]
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def test_a_run_is_found_again_when_the_answer_to_its_creation_was_lost(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    journal = Journal(tmp_path / "run")
    journal.append("run", experiment="e", name="n", parent=None, artifacts=None, uri=uri,
                   params={}, config={}, time_ms=5)  # fmt: skip
    first = tracking.Sender(journal, uri)
    first.deliver(journal.pending[0])
    created = journal.run_id
    journal.run_id = None  # as after a crash before it was noted
    tracking.Sender(journal, uri).deliver(journal.pending[0])
    assert journal.run_id == created


def test_two_trainings_do_not_write_into_one_folder(tiny: Write, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    with pytest.raises(OSError, match="run is in use by another process"):
        single(tiny("run"), "tracking.enabled=true", "train.max_steps=1")
    journal.close()
    with (
        checkpoint.alone(tmp_path / "other"),
        pytest.raises(OSError, match="other is in use by another process"),
    ):
        single(tiny("other"), "train.max_steps=1")
    assert not (tmp_path / "other" / "outcome.json").exists()


def test_what_is_not_finite_is_kept_to_be_looked_into(
    tiny: Write, tmp_path: Path, faces: ShardSet
) -> None:
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        single(tiny("run"), "optim.lr=1e30", "loss.fcn=center")
    evidence = json.loads((tmp_path / "run" / "not-finite-rank0.json").read_text())
    assert evidence["step"] == 2 and evidence["seed"] == 0 and len(evidence["keys"]) == 8
    split = faces.split("train")
    assert evidence["keys"] == [split.key(i) for i in evidence["ids"]]
    assert outcome(tmp_path / "run")["status"] == "failed"


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], *, gradient: bool) -> None:
    """Makes the loss, or the gradient alone, NaN at these steps."""
    forward, count = engine.Engine._forward, iter(range(1, 1000))

    def poisoned(self, images, labels):  # type: ignore[no-untyped-def]
        loss = forward(self, images, labels)
        if next(count) in steps:
            weight = next(self.objective.parameters())
            nan = weight.sum() * math.nan
            total = loss.total + (nan - nan.detach()).nan_to_num() if gradient else loss.total + nan
            return loss._replace(total=total, parts=loss.parts if gradient else loss.parts + nan)
        return loss

    monkeypatch.setattr(engine.Engine, "_forward", poisoned)


@pytest.mark.parametrize("gradient", [True, False])
def test_steps_that_are_not_finite_can_be_skipped_up_to_a_limit(
    tiny: Write,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gradient: bool,
) -> None:
    what = "gradient" if gradient else "loss"
    with monkeypatch.context() as patched:
        poison(patched, {3, 7}, gradient=gradient)
        ended = single(tiny("run"), *DAN, "train.max_skipped_steps=2")
        assert ended.status == "finished" and math.isfinite(ended.metrics["accuracy"])
    assert f"the {what} is not finite at step 7" in caplog.text
    assert "skipped, the 2. of at most 2" in caplog.text
    with monkeypatch.context() as patched:
        poison(patched, {3, 7}, gradient=gradient)
        with pytest.raises(FloatingPointError, match=f"{what} is not finite at step 7"):
            single(tiny("other"), *DAN, "train.max_skipped_steps=1")


def test_a_skipped_step_leaves_nothing_behind() -> None:
    own = engine.Engine(
        Objective(networks.DAN(8, 2), 8), World(0, 0, 1, 1, torch.device("cpu")),
        optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.0, precision="float32",
        sync_bn=True, compile=False, global_batch=8, micro_batch=None, may_skip=True,
    )  # fmt: skip
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    images[0, 0, 0, 0] = math.inf
    before = {k: v.clone() for k, v in own.objective.state_dict().items()}
    votes = engine.Votes(False, False, 0)
    assert own.train_step(Batch(images, labels, labels), lr=0.1, votes=votes).skipped
    for name, value in own.objective.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("fault", ["unreadable", "stale", "truncated", "replaced", "slow"])
def test_shards_that_fail_in_flight(
    faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, fault: str,
) -> None:  # fmt: skip
    """After they were opened; what a disk of ours does not show is put in between."""
    shutil.copytree(faces.root, tmp_path / "shards")
    split, pread, opened = open_shardset(tmp_path / "shards").split("train"), os.pread, Path.open
    reader, row = Reader(split, max_bad=99), split.index[0]
    shard, intact = split.path(row["shard"]), reader.read(0).tobytes()
    number = {"unreadable": errno.EIO, "stale": errno.ESTALE}.get(fault)

    def failing(file: int, size: int, offset: int) -> bytes:
        time.sleep(0.05 if fault == "slow" else 0)
        if number and Path(f"/proc/self/fd/{file}").readlink().name.startswith(shard.name):
            raise OSError(number, os.strerror(number))
        return pread(file, size, offset)

    def closed(path: Path, *arguments: Any, **rest: Any) -> Any:
        if number == errno.EIO and path == shard:
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **rest)

    monkeypatch.setattr("dan_dist.data.os.pread", failing)
    monkeypatch.setattr(Path, "open", closed)
    if fault == "truncated":
        os.truncate(shard, 0)
    elif fault == "replaced":
        shard.write_bytes(bytes(shard.stat().st_size))
    elif fault == "stale":
        shard.unlink()
    if fault == "slow":
        assert reader.read(0).tobytes() == intact and not reader.bad
        return
    with pytest.raises(TooMuchDamageError, match=f"no intact image .* {shard.name}/#0"):
        reader.read(0)  # a class of one shard
    assert (
        f"damaged image {shard.name}/#0 (" in caplog.text and "replaced by another" in caplog.text
    )
    reader.max_bad = 0
    with pytest.raises(TooMuchDamageError, match="at most 0 are tolerated"):
        reader.report(50, "broken")
    reader.close()


def test_a_deleted_shard_is_read_to_the_end(faces: ShardSet, tmp_path: Path) -> None:
    shutil.copytree(faces.root, tmp_path / "shards")
    reader = Reader(open_shardset(tmp_path / "shards").split("train"), max_bad=0)
    for path in (tmp_path / "shards").glob("*.tar"):
        path.unlink()
    reader.read(0)
    reader.close()


def test_damage_under_and_over_the_limit(tiny: Write, tmp_path: Path, faces: ShardSet) -> None:
    """Planted at step 7: under the limit, however often it stops, the run is that of its data;
    over it, restored shards give what had been if nothing had ever happened."""
    shards = tmp_path / "shards"
    shutil.copytree(faces.root, shards)
    split = open_shardset(shards).split("train")
    options = [f"data.shards={shards}", "data.max_bad_images=3", "train.keep_checkpoints=9",
               "tracking.enabled=true"]  # fmt: skip
    whole = single(tiny("whole"), *options).metrics
    for name in ("reference", "run", "over"):
        single(tiny(name), *options, "train.max_steps=7")
    order = TrainOrder(split, slice(0, 8), global_batch=8, seed=0, balanced=True)
    originals = {path: path.read_bytes() for path in shards.glob("*.tar")}

    def damage(step: int, images: int) -> None:
        for i in order(step - 1).ids[:images]:
            row = split.index[i]
            with split.path(row["shard"]).open("r+b") as file:
                file.seek(int(row["offset"]) + 50)
                file.write(bytes(40))

    damage(9, 1)
    reference = single(tiny("reference"), *options)
    single(tiny("run"), *options, "train.max_steps=13")
    assert single(tiny("run"), *options).metrics == reference.metrics
    ended = [checkpoint.load(checkpoint.step_path(tmp_path / n, 20)) for n in ("reference", "run")]
    assert ended[0]["replaced"] == ended[1]["replaced"] > 0
    weights = [e["objective"] for e in ended]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    single(tiny("over"), *options, "train.max_steps=13", "train.checkpoint_every=2")
    damage(16, 8)
    with pytest.raises(TooMuchDamageError, match=r"train-\d+-00000\.tar/face_\d+: its checksum"):
        single(tiny("over"), *options)
    assert outcome(tmp_path / "over")["status"] == "failed"
    for path, content in originals.items():
        path.write_bytes(content)
    assert single(tiny("over"), *options).metrics == whole
    assert (tmp_path / "over" / "step-00000010.pt.damaged").exists()  # 8 is from before the damage

    def losses(name: str) -> dict[int, float]:
        records = [r for r in read_records(tmp_path / name) if r["kind"] == "metrics"]
        kept = [(r["step"], r["values"]) for r in records]
        assert len({step for step, v in kept if "train/loss" in v}) == 20
        return {step: v["train/loss"] for step, v in kept if "train/loss" in v}

    assert losses("over") == losses("whole")


def test_a_checkpoint_from_before_the_damage_is_preferred(tiny: Write, tmp_path: Path) -> None:
    single(tiny("run"), "train.checkpoint_every=5", "train.keep_checkpoints=9")
    found = checkpoint.newest(tmp_path / "run")
    assert found and found[0].name == "step-00000020.pt"
    checkpoint.note_damage(tmp_path / "run", 12)
    found = checkpoint.newest(tmp_path / "run")
    assert found and found[0].name == "step-00000010.pt"
    checkpoint.note_damage(tmp_path / "run", 2)  # none is from before: the newest
    found = checkpoint.newest(tmp_path / "run")
    assert found and found[0].name == "step-00000020.pt"


def test_memory_does_not_grow_over_ten_thousand_steps(faces: ShardSet) -> None:
    stream = train_stream(
        faces.split("train"), rank=0, world_size=1, global_batch=8, seed=0, balanced=True,
        augment=Augment(0.5, 0.7, 20, (0.8, 1.0), 0.2, 0.5), max_bad=0, start=0, image_size=32,
        shard_image_size=32, device=torch.device("cpu"), threads=1,
    )  # fmt: skip

    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    for _ in range(1000):
        next(stream)
    before = resident_mib()
    for _ in range(10_000):
        next(stream)
    grown = resident_mib() - before
    stream.close()
    logging.getLogger(__name__).info("grown by %.1f MiB", grown)
    assert grown < 20


def test_a_server_that_hangs_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and never answers."""
    import socket

    monkeypatch.setattr(tracking, "SHORT_DRAIN_S", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        tracker = tracking.MlflowTracker(
            tmp_path / "run",
            experiment="e",
            run_name=None,
            parent=None,
            params={},
            tags={},
            config={},
        )
        began = time.monotonic()
        for step in range(50):
            tracker.metrics({"train/loss": 1.0}, step)
        assert time.monotonic() - began < 1.0
        tracker.end("KILLED")
        assert time.monotonic() - began < 3.0
    assert len(Journal(tmp_path / "run").pending) == 53


def test_checkpoints_by_the_clock(tiny: Write, tmp_path: Path) -> None:
    single(tiny("run"), "train.checkpoint_minutes=1e-6", "train.keep_checkpoints=99")
    steps = [int(p.stem[5:]) for p in checkpoint.steps_saved(tmp_path / "run")]
    assert len(steps) > 8 and steps[0] == 20  # every other step: ranks agree one step late
