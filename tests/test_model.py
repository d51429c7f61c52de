"""The network's shape, and backbones from files."""

from pathlib import Path

import pytest
import torch
import torchvision

from dan_dist.model import dan
from dan_dist.model.backbone import load_backbone
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from dan_dist.run import checkpoint


@pytest.mark.parametrize(
    ("classes", "heads", "count"), [(7, 4, 19_723_733), (8, 4, 19_724_248), (8, 1, 13_316_536)]
)
def test_parameter_counts_of_the_authors_network(classes: int, heads: int, count: int) -> None:
    assert sum(p.numel() for p in DAN(classes, heads).parameters()) == count


@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("size", [32, 96])
def test_shapes(heads: int, size: int) -> None:
    output = DAN(8, heads).eval()(torch.randn(2, 3, size, size))
    assert output.logits.shape == (2, 8) and output.features.shape == (2, 512)
    assert (output.heads is None) if heads == 0 else (output.heads.shape == (2, heads, 512))


def test_baseline_is_torchvisions_resnet18() -> None:
    network, reference = DAN(1000, 0).eval(), torchvision.models.resnet18(weights=None).eval()
    load = {**{f"backbone.{k}": v for k, v in reference.state_dict().items() if "fc" not in k}}
    load |= {f"classifier.{k}": v for k, v in reference.fc.state_dict().items()}
    network.load_state_dict(load)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(network(images).logits, reference(images), atol=1e-5)


def test_a_random_start_is_torchvisions() -> None:
    """To the bit, and torch's generator goes on from the same place: seeds mean what they meant."""
    torch.manual_seed(5)
    reference, following = torchvision.models.resnet18(weights=None).state_dict(), torch.rand(4)
    torch.manual_seed(5)
    network = DAN(8, 0)
    torch.manual_seed(5)
    backbone, own = dan._resnet18(64).state_dict(), torch.rand(4)
    assert torch.equal(own, following)
    for found in (backbone, network.backbone.state_dict()):
        assert [*found] == [name for name in reference if not name.startswith("fc.")]
        assert all(torch.equal(tensor, reference[name]) for name, tensor in found.items())


@pytest.mark.parametrize("width", [8, 32, 64, 128])
def test_a_networks_width(width: int) -> None:
    """All stages follow it, and the heads; of 64, torchvision's 11,176,512 parameters."""
    network = DAN(8, 2, width=width).eval()
    first, stages, norms = 3 * 7 * 7 * width, 2724 * width**2, 2 * 75 * width
    assert sum(p.numel() for p in network.backbone.parameters()) == first + stages + norms
    output = network(torch.randn(2, 3, 32, 32))
    assert output.features.shape == (2, 8 * width) and output.logits.shape == (2, 8)
    assert output.heads is not None and output.heads.shape == (2, 2, 8 * width)
    assert Objective(network, 8).centers.shape == (8, 8 * width)


def test_backbone_of_another_width_is_refused(tmp_path: Path) -> None:
    objective = Objective(DAN(8, 0, width=16), 8)
    checkpoint.save(tmp_path / "best.pt", {"objective": objective.state_dict(), "step": 3})
    assert "100 tensors" in load_backbone(DAN(7, 1, width=16), str(tmp_path / "best.pt"))
    with pytest.raises(ValueError, match=r"or of another shape: network\.backbone\.conv1\.weight"):
        load_backbone(DAN(7, 1), str(tmp_path / "best.pt"))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_backbone_files_in_circulation_load(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    renamed = {prefix + k: v for k, v in state.items()}
    torch.save({"state_dict": renamed} if wrapped else renamed, tmp_path / "backbone.pth")
    network = DAN(7, 1)
    assert "100 tensors" in load_backbone(network, str(tmp_path / "backbone.pth"))
    assert torch.equal(network.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_backbone_of_our_own_checkpoint_loads(tmp_path: Path) -> None:
    objective = Objective(DAN(8, 2), 8)  # other classes and heads than here
    checkpoint.save(tmp_path / "best.pt", {"objective": objective.state_dict(), "step": 3})
    network = DAN(7, 1)
    assert "100 tensors" in load_backbone(network, str(tmp_path / "best.pt"))
    for name, tensor in objective.network.backbone.named_parameters():
        assert torch.equal(network.backbone.get_parameter(name), tensor)


def test_backbone_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": torchvision.models.resnet34().state_dict()}, tmp_path / "r34.pth")
    with pytest.raises(ValueError, match=r"more than a ResNet-18: layer1\.2\.conv1\.weight"):
        load_backbone(DAN(7, 1), str(tmp_path / "r34.pth"))
    state = torchvision.models.resnet18().state_dict()
    torch.save({k.replace("conv", "c"): v for k, v in state.items()}, tmp_path / "other.pth")
    line = r"of a ResNet-18 103 of 120 tensors match; missing .*: conv1\.weight, .*; unknown: c1\."
    with pytest.raises(ValueError, match=line):
        load_backbone(DAN(7, 1), str(tmp_path / "other.pth"))


def test_missing_backbone_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file; give the path .* 'imagenet'"):
        load_backbone(DAN(7, 1), str(tmp_path / "missing.pth"))


def test_backbone_files_run_no_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_backbone(DAN(7, 1), str(tmp_path / "harmful.pth"))
    assert not (tmp_path / "executed").exists()
