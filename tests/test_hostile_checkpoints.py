"""Checkpoints from strangers: refused in one line before any work, by one check."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
from dan_dist.run import checkpoint
from dan_dist.run.checkpoint import RESUMED
from dan_dist.run.folder import DAMAGE, checkpoint_to_resume, step_path, steps_saved
from dan_dist.train import read_checkpoint
from shards.format import ShardSet, open_shardset

Change = Callable[[dict[str, Any]], object]


def aliased(depth: int) -> list[Any]:
    """2^depth values in as many bytes as `depth` takes."""
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def put(*keys: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


WEIGHT = ("objective", "network.classifier.weight")
SPOILED: dict[str, tuple[Change, str]] = {
    "NaN": (put("objective", "network.classifier.bias", value=torch.full((8,), torch.nan)),
            r"objective\.network\.classifier\.bias: 8 of 8 values are not finite"),
    "infinite": (put("objective", "centers", value=torch.full((8, 512), torch.inf)), "not finite"),
    "overflow": (put("objective", "network.backbone.bn1.running_var", value=-torch.ones(64)),
                 "output for a gray image is not finite"),
    "meta": (put(*WEIGHT, value=torch.empty(8, 512, device="meta")), "on device meta"),
    "sparse": (put(*WEIGHT, value=torch.eye(8, 512).to_sparse()), "sparse_coo"),
    "complex": (put(*WEIGHT, value=torch.ones(8, 512, dtype=torch.complex64)), "complex64"),
    "quantised": (put(*WEIGHT, value=torch.quantize_per_tensor(torch.ones(8, 512), 1, 0,
                                                               torch.quint8)), "quint8"),
    "no tensor": (put(*WEIGHT, value=[1.0]), "objective.*expected a tensor"),
    "pixels": (put("config", "model", "image_size", value=2**70), "whole number of 71 bits"),
    "many pixels": (put("config", "model", "image_size", value=2**16), r"image_size is 65536"),
    "heads": (put("config", "model", "heads", value=10**6), r"config\.model\.heads is 1000000"),
    "fusion": (put("config", "model", "fusion", value="max"), r"config\.model\.fusion is 'max'"),
    "precision": (put("config", "train", "precision", value="fp3"), r"precision is 'fp3'"),
    "tensor in it": (put("config", "data", "x", value=torch.ones(2)), r"data\.x is a tensor"),
    "graph": (put("config", "data", "x", value=aliased(30)), "more than 4,000,000 values"),
    "deep": (put("config", "data", "x", value=aliased(40)), "deeper than 32 levels|4,000,000"),
    "number": (put("config", "data", "x", value=10**500), "a whole number of"),
    "text": (put("config", "data", "x", value="x" * 20_000), "a text of 20,000 characters"),
    "escape": (put("class_names", value=[*"abcdefg", "\x1b[31m"]), r"class_names holds '\\x1b"),
    "step": (put("step", value="3"), "step is '3', expected a whole number"),
    "run": (put("run_id", value=["a"]), "run_id is a list"),
}  # fmt: skip


@pytest.fixture(scope="module")
def best(dan_run: Path) -> dict[str, Any]:
    return checkpoint.read(dan_run / "best.pt")


@pytest.fixture(scope="module")
def last(dan_run: Path) -> dict[str, Any]:
    return checkpoint.load(steps_saved(dan_run)[0], keys=RESUMED)


def copy(value: Any) -> Any:
    return {key: copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


WRITTEN = ("NaN", "meta", "sparse", "quantised", "graph")


def as_file(content: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in which torch finds this content."""
    path.write_bytes(b"a stand-in")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: content)


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


def moment(key: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        own = dict(content["optimizer"]["state"])
        own[3] = {**own[3], key: value}
        content["optimizer"] = {**content["optimizer"], "state": own}

    return change


STATES: dict[str, tuple[Change, str]] = {
    "shape": (moment("exp_avg", torch.ones(3)), r"state\.3\.exp_avg is of shape"),
    "NaN": (moment("exp_avg_sq", torch.full((64,), torch.nan)), "3.exp_avg_sq holds what"),
    "foreign": (moment("momentum_buffer", torch.ones(3)), r"state\.3 is not of adam"),
    "no state": (put("optimizer", value={}), "expected its state and its param_groups"),
    "groups": (put("optimizer", "param_groups", value=[{"params": [0]}]), "param_groups are not"),
    "missing": (lambda c: c["objective"].pop("centers"), r"objective\.centers is missing"),
    "more": (put("objective", "network.x", value=torch.ones(1)), r"network\.x is none of"),
    "marks": (put("figures", value=[["a"]]), r"figures\.0\.0 is 'a'"),
    "judged": (put("right", value=[1]), r"right is a list"),
    "replaced": (put("replaced", value=-1), r"replaced is -1, expected a whole number"),
    "best": (put("best", value={"accuracy": "high"}), r"best\.accuracy is 'high'"),
    "sets": (put("sets", value=3), r"sets is 3, expected a list"),
    "former": (put("config", "loss", "afn", value="partition_batch"),
               r"cannot be gone on from: loss\.afn: partition_batch has gone.*partition_release"),
}  # fmt: skip


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


def test_the_mark_of_damage_is_a_step(dan_run: Path, tmp_path: Path) -> None:
    run = copied(dan_run, tmp_path / "run")
    (run / DAMAGE).write_bytes(b"soon\x1b[31m")
    with pytest.raises(ValueError, match=rf"{DAMAGE}: holds 'soon.*expected a step; remove it"):
        checkpoint_to_resume(run, "auto")


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
