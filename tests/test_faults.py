"""What a run survives: signals, killed ranks, damaged shards, what is not finite."""

import errno
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import psutil
import pytest
import torch

from conftest import DAN, SCRIPT, outcome, single, start, until
from dan_dist import train as story
from dan_dist.config import load_config
from dan_dist.data.augment import Augment
from dan_dist.data.loader import Batch, train_loader
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader, TooMuchDamageError
from dan_dist.distributed.world import World
from dan_dist.engine import ddp as engine
from dan_dist.engine.ddp import Engine
from dan_dist.model import dan as networks
from dan_dist.model.losses import Objective
from dan_dist.run import checkpoint
from dan_dist.run.folder import mark_damage, newest, step_path
from dan_dist.run.signals import Stopped, StopRequest
from dan_dist.tracking.journal import read_records
from shards.format import ShardSet, open_shardset

Write = Callable[[str], Path]


@pytest.mark.parametrize(("task", "faults"), [("expression", 2), ("identity", 1)])
def test_chaos_in_short(tmp_path: Path, task: str, faults: int) -> None:
    """Some of the kinds, and the comparison with the undisturbed run, bit for bit."""
    kinds = ["sigkill_rank", "sigkill_all", "sigusr1", "corrupt_checkpoint", "truncate_shard"]
    tallies = chaos.run(tmp_path, faults, random.randrange(10**6), kinds, task)
    assert sum(t.injected for t in tallies.values()) >= 1


def test_stopped_alone_it_says_so_by_its_exit_code(tiny: Write, tmp_path: Path) -> None:
    process = start(SCRIPT, tiny("run"), "train.epochs=200", cwd=tmp_path)
    until(process, "step 5 ")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    found = outcome(tmp_path / "run")
    assert found["status"] == "preempted" and found["reason"].startswith("SIGTERM")
    assert f"of step {found['step']}; the same command goes on from there" in said
    assert step_path(tmp_path / "run", found["step"]).exists()


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
    flags = engine.StepFlags(False, False, 0)
    assert own.train_step(Batch(images, labels, labels), lr=0.1, flags=flags).skipped
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
    ended = [checkpoint.load(step_path(tmp_path / n, 20)) for n in ("reference", "run")]
    assert ended[0]["replaced"] == ended[1]["replaced"] > 0
    weights = [e["objective"] for e in ended]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    single(tiny("over"), *options, "train.max_steps=13", "train.checkpoint_every=2")
    damage(16, 8)
    with pytest.raises(TooMuchDamageError, match=r"train-\d+-\d+\.tar/face_\d+: its checksum"):
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
    found = newest(tmp_path / "run")
    assert found and found[0].name == "step-00000020.pt"
    mark_damage(tmp_path / "run", 12)
    found = newest(tmp_path / "run")
    assert found and found[0].name == "step-00000010.pt"
    mark_damage(tmp_path / "run", 2)  # none is from before: the newest
    found = newest(tmp_path / "run")
    assert found and found[0].name == "step-00000020.pt"


def test_memory_does_not_grow_over_ten_thousand_steps(faces: ShardSet) -> None:
    loader = train_loader(
        faces.split("train"), rank=0, world_size=1, global_batch=8, seed=0, balanced=True,
        augment=Augment(0.5, 0.7, 20, (0.8, 1.0), 0.2, 0.5), max_bad=0, start=0, image_size=32,
        shard_image_size=32, device=torch.device("cpu"), threads=1,
    )  # fmt: skip

    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    for _ in range(1000):
        next(loader)
    before = resident_mib()
    for _ in range(10_000):
        next(loader)
    grown = resident_mib() - before
    loader.close()
    logging.getLogger(__name__).info("grown by %.1f MiB", grown)
    assert grown < 20


def follow(process: subprocess.Popen[str], texts: list[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        texts[number] += line
