"""Checkpoints from strangers: refused in one line before any work, by one check."""

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from spoiled import SPOILED, STATES, aliased, copy
from torch import Tensor

from conftest import DAN as OPTIONS
from conftest import STEPS, TINY, copied
from dan_dist.build import assemble_data
from dan_dist.config import load_config
from dan_dist.distributed.world import World
from dan_dist.engine.resumed import check_state
from dan_dist.model.backbone import load_backbone
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from dan_dist.model.weights import load_trained
from dan_dist.run import checkpoint, pickled
from dan_dist.run.checkpoint import RESUMED
from dan_dist.run.folder import (
    DAMAGE,
    checkpoint_to_resume,
    damaged_since,
    mark_damage,
    step_path,
    steps_saved,
)
from dan_dist.train import read_checkpoint
from shards.format import ShardSet, open_shardset


@pytest.fixture(scope="module")
def best(dan_run: Path) -> dict[str, Any]:
    return checkpoint.read(dan_run / "best.pt")


@pytest.fixture(scope="module")
def last(dan_run: Path) -> dict[str, Any]:
    return checkpoint.load(steps_saved(dan_run)[0], keys=RESUMED)


WRITTEN = ("NaN", "meta", "sparse", "quantised", "graph")


def as_file(content: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in which torch finds this content."""
    path.write_bytes(b"a stand-in")
    os.truncate(path, 2**30)  # as large as its tensors, by its size
    monkeypatch.setattr(pickled, "load", lambda _: content)


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_is_one_line(
    best: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """evaluate, predict, explain, export and the served model load by `load_trained` alone."""
    change, line = SPOILED[name]
    content = copy(best)
    change(content)
    if name in WRITTEN:
        torch.save(content, tmp_path / "best.pt")
    else:  # without 70 MB of weights on the disk
        as_file(content, tmp_path / "best.pt", monkeypatch)
    with pytest.raises(ValueError, match=line) as raised:
        load_trained(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path / "best.pt") in str(raised.value)
    assert "\x1b" not in str(raised.value)
    if name in ("NaN", "sparse", "graph"):
        with pytest.raises(ValueError, match=rf"model\.backbone .*best\.pt.*{line}"):
            load_backbone(DAN(8, 2), str(tmp_path / "best.pt"))


def test_a_graph_of_many_values_is_walked_without_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To name a value takes ten times as long as to walk to it; a tensor is looked at once."""
    named = list[object]()
    monkeypatch.setattr(checkpoint, "dotted", lambda place: str(named.append(place)))
    content = {"config": {"x": aliased(16)}, "optimizer": {"x": aliased(16, torch.zeros(1))}}
    checkpoint.check(tmp_path / "x.pt", content, ())
    assert len(named) == 1


def test_a_compressed_checkpoint_is_not_unpacked(best: dict[str, Any], tmp_path: Path) -> None:
    """torch compresses nothing; a compressed part may be of any size, one given twice as well."""
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"small\.pt: not a .*data\.pkl in it is compressed"):
        checkpoint.read(tmp_path / "small.pt")
    data = (tmp_path / "plain.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "plain.pt", "a") as plain:
        twice = [*plain.filelist, *plain.filelist]
        plain.filelist[:] = twice
        plain._didModify = True  # type: ignore[attr-defined]
    assert len((tmp_path / "plain.pt").read_bytes()) < 1.1 * len(data)
    with pytest.raises(ValueError, match="its parts are larger than the file"):
        checkpoint.read(tmp_path / "plain.pt")


@pytest.mark.parametrize("name", STATES)
def test_an_odd_state_is_refused_before_it_is_loaded(
    last: dict[str, Any], faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:  # fmt: skip
    change, line = STATES[name]
    content = copy(last)
    change(content)
    as_file(content, path := step_path(tmp_path, content["step"]), monkeypatch)
    config_file = tmp_path / "c.yaml"
    config_file.write_text(TINY.format(shards=faces.root, output=tmp_path / "run"))
    config = load_config(config_file, [*OPTIONS, *STEPS])
    world = World(0, 0, 1, 1, torch.device("cpu"))
    data = assemble_data(config, world, open_shardset(faces.root))
    with pytest.raises(ValueError, match=line) as raised:
        read_checkpoint(str(path), config, data)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_the_mark_of_damage_is_a_step_or_nothing(
    dan_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(dan_run, tmp_path / "run")
    (run / DAMAGE).write_bytes(b"soon\x1b[31m")
    with pytest.raises(ValueError, match=rf"{DAMAGE}: holds 'soon.*expected a step; remove it"):
        checkpoint_to_resume(run, "auto")
    for nothing in (b"", b"\n"):  # of a full disk
        (run / DAMAGE).write_bytes(nothing)
        assert damaged_since(run) is None and checkpoint_to_resume(run, "auto")
    (run / DAMAGE).unlink()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        mark_damage(run, 7)
    assert not list(run.glob(f"{DAMAGE}*"))


def test_a_checkpoint_with_the_former_loss_still_evaluates(
    best: dict[str, Any], tmp_path: Path
) -> None:
    content = copy(best)
    content["config"]["loss"]["afn"] = "partition_batch"
    del content["config"]["model"]["fusion"]  # of before there was a choice
    torch.save(content, tmp_path / "best.pt")
    trained = load_trained(tmp_path)
    assert trained.network.fusion == "log_softmax" and trained.facts["images"] == 16
    with pytest.raises(ValueError, match=r"partition_batch has gone; .* partition_release"):
        load_config("demo", ["loss.afn=partition_batch"])


def test_a_fresh_state_is_accepted() -> None:
    objective = Objective(DAN(5, 2), 5)
    optim = load_config("demo", []).optim
    count = sum(1 for _ in objective.parameters())
    state: dict[str, Any] = {"state": {}, "param_groups": [{"params": list(range(count))}]}
    own: dict[str, Tensor] = objective.state_dict()
    check_state({"objective": own, "optimizer": state}, objective, optim)
