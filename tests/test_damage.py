"""Damaged images and shards that fail while they are read."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ALONE, outcome, single
from dan_dist.config import load_config
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader, TooMuchDamageError
from dan_dist.monitor import save_evidence
from dan_dist.run import checkpoint
from dan_dist.run.folder import damaged_since, mark_damage, newest_checkpoint, step_path
from dan_dist.run.state import TrainState
from dan_dist.tracking.journal_files import read_records
from shards.format import ShardSet, open_shardset

Write = Callable[[str], Path]


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

    monkeypatch.setattr(os, "pread", failing)
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
    with pytest.raises(TooMuchDamageError, match=f"shards: no intact image .* {shard.name}/#0"):
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


@pytest.mark.slow
def test_damage_under_and_over_the_limit(tiny: Write, tmp_path: Path, faces: ShardSet) -> None:
    """Planted at step 7: under the limit, however often it stops, the run is that of its data;
    over it, restored shards give what had been if nothing had ever happened."""
    shards = tmp_path / "shards"
    shutil.copytree(faces.root, shards)
    split = open_shardset(shards).split("train")
    options = [f"data.shards={shards}", "data.max_bad_images=3", "train.keep_checkpoints=9"]
    tracked = [*options, "tracking.enabled=true"]
    whole = single(tiny("whole"), *tracked).metrics
    for name, own in (("reference", options), ("run", options), ("over", tracked)):
        single(tiny(name), *own, "train.max_steps=7")
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
    single(tiny("over"), *tracked, "train.max_steps=13", "train.checkpoint_every=2")
    damage(16, 8)
    with pytest.raises(TooMuchDamageError, match=r"train-\d+-\d+\.tar/face_\d+: its checksum"):
        single(tiny("over"), *tracked)
    assert outcome(tmp_path / "over")["status"] == "failed"
    for path, content in originals.items():
        path.write_bytes(content)
    assert single(tiny("over"), *tracked).metrics == whole
    assert (tmp_path / "over" / "step-00000010.pt.damaged").exists()  # 8 is from before the damage

    def losses(name: str) -> dict[int, float]:
        records = [r for r in read_records(tmp_path / name) if r["kind"] == "metrics"]
        kept = [(r["step"], r["values"]) for r in records]
        assert len({step for step, v in kept if "train/loss" in v}) == 20
        return {step: v["train/loss"] for step, v in kept if "train/loss" in v}

    assert losses("over") == losses("whole")


def test_damage_of_validation_images_marks_nothing(
    tiny: Write, faces: ShardSet, tmp_path: Path
) -> None:
    config, train, val = load_config(tiny("run")), faces.split("train"), faces.split("val")
    (tmp_path / "run").mkdir()
    state = TrainState(step=9, replaced=1, replaced_since=7)
    for split, mark in ((val, None), (train, 7)):
        with (
            pytest.raises(TooMuchDamageError, match="x"),
            save_evidence(config, ALONE, train, state),
        ):
            raise TooMuchDamageError("x", split)
        assert damaged_since(tmp_path / "run") == mark


def test_a_checkpoint_from_before_the_damage_is_preferred(tiny: Write, tmp_path: Path) -> None:
    single(tiny("run"), "train.checkpoint_every=5", "train.keep_checkpoints=9")
    found = newest_checkpoint(tmp_path / "run")
    assert found and found[0].name == "step-00000020.pt"
    mark_damage(tmp_path / "run", 12)
    found = newest_checkpoint(tmp_path / "run")
    assert found and found[0].name == "step-00000010.pt"
    mark_damage(tmp_path / "run", 2)  # none is from before: the newest
    found = newest_checkpoint(tmp_path / "run")
    assert found and found[0].name == "step-00000020.pt"
