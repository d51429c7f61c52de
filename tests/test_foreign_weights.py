"""Weights in circulation: whatever holds all tensors of a network loads, and runs no code."""

import argparse
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from authors import authors_state
from safetensors.torch import save_file
from torch import Tensor

from conftest import LAUNCH
from dan_dist.model.authors import authors_name
from dan_dist.model.backbone import load_backbone
from dan_dist.model.dan import DAN
from dan_dist.model.weights import load_trained
from dan_dist.run import checkpoint
from shards.releases import affectnet

State = dict[str, Tensor]
Wrap = Callable[[State], Any]


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def lightning(state: State) -> dict[str, Any]:
    return {
        "pytorch-lightning_version": "2.5", "epoch": 7,
        "state_dict": {**under("model.net.", state), "criterion.centers": torch.zeros(8, 512)},
        "hyper_parameters": {"args": argparse.Namespace(lr=1e-3, out=Path("runs"))},
        "callbacks": {"best": np.float32(0.5), "counts": np.arange(3)},
    }  # fmt: skip


WRAPS: dict[str, Wrap] = {
    "bare": dict,
    "net": lambda s: {"net": s, "acc": 0.62},
    "unusual": lambda s: {"weights_of_student": OrderedDict(s), "loss": [1.0]},
    "deeper": lambda s: {"checkpoint": {"inner": under("module.", s)}, "teacher": {"a": 3}},
    "compiled": lambda s: {"model_state_dict": under("_orig_mod.module.", s)},
    "numpy": lambda s: {"state_dict": s, "acc": np.float64(0.62), "confusion": np.eye(3)},
    "lightning": lightning,
    "pair": lambda s: (["best", under("student_", s)], 0.62),
    "histories": lambda s: {
        "net": under("module.", s),
        "loss": defaultdict(list, {"train": [0.5]}),
        "best": defaultdict(float),
        "when": datetime(2026, 11, 27),
        "took": timedelta(hours=1),
    },
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_dan_loads_as_forks_save_it(tmp_path: Path, wrap: str) -> None:
    state = authors_state(8, 1)
    torch.save(WRAPS[wrap](state), tmp_path / "dan.pth")
    trained = load_trained(tmp_path / "dan.pth")
    assert trained.class_names == affectnet.CLASSES
    own = trained.network.state_dict()
    assert all(torch.equal(value, state[authors_name(key)]) for key, value in own.items())
    assert trained.step == (7 if wrap == "lightning" else 0)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_resnet_loads_wherever_it_stands(tmp_path: Path, wrap: str) -> None:
    resnet = torchvision.models.resnet18(num_classes=10)
    torch.save(WRAPS[wrap](resnet.state_dict()), tmp_path / "r.pth")
    network = DAN(7, 1)
    assert "backbone: 100 tensors from" in load_backbone(network, str(tmp_path / "r.pth"))
    assert torch.equal(network.backbone.get_parameter("conv1.weight"), resnet.conv1.weight)


def test_a_resnet_whose_layers_stand_in_a_row_loads(tmp_path: Path) -> None:
    """`nn.Sequential(*list(resnet.children())[:-2])` within something larger, as safetensors."""
    resnet = torchvision.models.resnet18()
    row = torch.nn.Sequential(*list(resnet.children())[:-2]).state_dict()
    save_file({**under("encoder_q.", row), "queue": torch.zeros(3)}, tmp_path / "any.name")
    network = DAN(7, 1)
    line = load_backbone(network, str(tmp_path / "any.name"))
    assert line.endswith("(under 'encoder_q.')")
    found = network.backbone.get_parameter("layer4.1.conv2.weight")
    assert torch.equal(found, resnet.layer4[1].conv2.weight)


def test_our_own_tensors_load_with_their_classes_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = DAN(3, 2).state_dict()
    save_file(state, tmp_path / "own.safetensors")
    trained = load_trained(tmp_path / "own.safetensors", "a,b,c")
    assert trained.class_names == ("a", "b", "c") and len(trained.network.heads) == 2
    with pytest.raises(ValueError, match="a network's tensors alone, which does not name its 3"):
        load_trained(tmp_path / "own.safetensors")


def test_archives_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    torch.save(authors_state(8, 1), tmp_path / "dan.pth")
    with zipfile.ZipFile(tmp_path / "zipped.pth", "w") as parts:
        parts.write(tmp_path / "dan.pth", "weights/dan.pth")
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as parts:  # torch deprecates writing one
        parts.writestr("script/data.pkl", b"")
        parts.writestr("script/code/__torch__.py", "")
    for name, line in (
        ("zipped.pth", "an archive of 1 files, weights/dan.pth; unpack it"),
        ("arrays.npz", "an archive of 1 files, a.npy; unpack it"),
        ("script.pt", "it is a TorchScript; save the network's state_dict"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: not a readable checkpoint \(.*{line}"):
            load_trained(tmp_path / name)


def test_several_networks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    state, other = authors_state(8, 1), {k: v + 1 for k, v in authors_state(8, 1).items()}
    torch.save({"ema": under("m.", other), "state_dict": state}, tmp_path / "both.pth")
    found = load_trained(tmp_path / "both.pth").network.classifier.weight
    assert torch.equal(found, state["fc.weight"])
    assert "the network (in 'state_dict'); left over: none; other whole networks: (in 'ema'" in (
        caplog.text
    )


def test_what_does_not_fit_says_what_fits_and_what_is_left(tmp_path: Path) -> None:
    state = under("net.", authors_state(8, 1))
    del state["net.features.0.weight"], state["net.bn.bias"]
    torch.save({"model": {**state, "net.extra": torch.ones(2), "odd\x1b[31m": torch.ones(1)}},
               tmp_path / "x.pth")  # fmt: skip
    with pytest.raises(ValueError) as raised:
        load_trained(tmp_path / "x.pth")
    line = str(raised.value)
    assert "162 of 164 tensors match (in 'model' under 'net.')" in line, line
    assert "missing or of another shape: net.features.0.weight, net.bn.bias;" in line
    assert r"unknown: net.extra, odd\x1b[31m" in line


def test_the_documented_lines_give_a_module(dan_run: Path) -> None:
    text = (LAUNCH / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from pathlib.*?)```", text, re.S)
    assert len([line for line in lines.splitlines() if line]) == 3
    found: dict[str, Any] = {}
    exec(lines.replace("runs/affectnet8", str(dan_run)), found)
    assert isinstance(found["network"], torch.nn.Module)
    assert found["network"](torch.zeros(2, 3, 32, 32)).logits.shape == (2, 8)


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "model": DAN(2, 0)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"dan_dist\.model\.dan\.DAN.*state_dict\(\) alone"):
        checkpoint.read(tmp_path / "module.pth")
