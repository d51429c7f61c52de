"""What a run survives, piece by piece; tests/chaos.py has the whole."""

import _thread
import errno
import json
import logging
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chaos
import pytest
import torch
from torch.distributed import HashStore

from conftest import DAN, REPOSITORY, run
from dan_dist import checkpoint, engine, pulse, tracking
from dan_dist import train as story
from dan_dist.augment import Augment
from dan_dist.config import load_config
from dan_dist.data import Reader, TooMuchDamageError, train_stream
from dan_dist.journal import Journal
from dan_dist.pulse import Pulse
from dan_dist.shardset import ShardSet
from dan_dist.stop import Stopped
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
    tallies = chaos.run(tmp_path, 4, random.randrange(10**6), kinds)
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
        "tracking.enabled=true"
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
    assert '"status": "failed", "step": 4' in between, between
    assert "resumed after step 4" in done.stdout.split("code ")[1]
    assert "finished after 20 steps" in done.stdout
    assert between.startswith("2")
    if policy == "stop":
        assert "error: no checkpoint could be written" in done.stderr
        return
    assert "the one before stays, training goes on" in done.stdout and "step 14 loss" in done.stdout
    assert "error: all 14 steps are done, but the last checkpoint" in done.stderr
    assert "journal.jsonl: No space left on device; what it is to hold waits" in done.stdout
    points = history(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [step for step, _ in points] == list(range(1, 21))


def test_a_rank_that_hangs_ends_the_job_and_is_named(tiny: Write, tmp_path: Path) -> None:
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT,
                    tiny("run"), "train.epochs=500", "train.timeout_s=8", cwd=tmp_path)  # fmt: skip
    try:
        until(process, "step 3 ")
        import psutil

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


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the lines of pulses that end their process, which here goes on."""
    lines: list[str] = []
    for name, value in {"BEAT_S": 0.02, "SILENT_S": 0.3, "YIELD_S": 0.0}.items():
        monkeypatch.setattr(pulse, name, value)
    monkeypatch.setattr(pulse.os, "_exit", lambda code: _thread.exit())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    yield lines


def pulses_of(store: Any, size: int, ended: list[str], timeout_s: float = 1.0) -> list[Pulse]:
    return [Pulse(store, r, size, timeout_s=timeout_s, on_loss=ended.append) for r in range(size)]


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
        worlds[0].once("faces", lambda: None)
    with pytest.raises(kind, match=words):
        worlds[1].together(lambda: None)
    pulses[1].close()
    assert not ended


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

    import psutil

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
    assert {a.path for a in client.list_artifacts(found.info.run_id)} >= {
        "config.yaml", "confusion_matrix.png", "checkpoints"
    }  # fmt: skip


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


def test_shards_that_fail_in_flight(
    faces: ShardSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EIO and slowness, which no file on a disk of ours shows."""
    split, pread = faces.split("train"), os.pread
    reader = Reader(split, max_bad=3)
    bad = {split.path(row["shard"]).name for row in split.index[:1]}

    def failing(file: int, size: int, offset: int) -> bytes:
        time.sleep(0.001)
        if Path(f"/proc/self/fd/{file}").readlink().name in bad and offset < 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, size, offset)

    monkeypatch.setattr("dan_dist.data.os.pread", failing)
    assert (
        reader.read(0).tobytes()
        == reader.read(next(i for i in range(1, 20) if i not in reader.bad)).tobytes()
    )
    assert "Input/output error" in caplog.text and "replaced by another" in caplog.text
    reader.max_bad = 0
    with pytest.raises(TooMuchDamageError, match="at most 0 are tolerated"):
        reader.report(50, "broken")
    reader.close()


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
