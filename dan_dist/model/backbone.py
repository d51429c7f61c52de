"""ResNet-18 backbones: read from files of many kinds, written by a training on identities."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from dan_dist.model.authors import STAGES
from dan_dist.model.classes import join_names
from dan_dist.model.dan import DAN
from dan_dist.model.state_dict import Place, find_places, match
from dan_dist.run.checkpoint import NETWORK, check, is_ours, learned, load, read, save
from dan_dist.run.plain import refuse_not_finite
from shards.command import words
from shards.files import is_address

BACKBONE = "backbone.pth"


def _in_a_row(key: str) -> str:
    """The name of a tensor where the layers stand in a row, as in the authors' files."""
    part, _, rest = key.partition(".")
    return f"{STAGES[part]}.{rest}"


# How files name a ResNet-18's tensors, and what the names begin with
TORCHVISION = (str, tuple(STAGES))
IN_A_ROW = (_in_a_row, tuple(map(str, STAGES.values())))


def load_backbone(network: DAN, source: str) -> str:
    """Starts the backbone from `source`: "none", "imagenet" (torchvision's weights) or a file.

    A file holds all tensors of a ResNet-18, in torchvision's names or in those of its layers in a
    row, at any place under any prefix: one of our checkpoints, the authors' DAN, MS-Celeb's ResNet
    in its two forms, a larger network of others. What stands beside them is left out.
    Returns a log line on what was loaded.
    """
    if source == "none":
        return "backbone: random start"
    origin = ""
    if source == "imagenet":
        content = _download_imagenet()
    else:
        content, origin = _read(Path(source))
    own = network.backbone.state_dict()
    trials = [
        match(place, own, name_of, modules)
        for name_of, modules in (TORCHVISION, IN_A_ROW)
        for place in find_places(content, {name_of(key) for key in own})
    ] or [match(Place("", "", {}), own, str, ())]
    found = next((trial for trial in trials if trial.is_whole), None)
    if found is None:
        nearest = max(trials, key=lambda trial: len(trial.found))
        if nearest.missing:
            raise ValueError(f"model.backbone {source}: of a ResNet-18 {nearest.describe()}")
        raise ValueError(
            f"model.backbone {source}: more than a ResNet-18: {join_names(nearest.strange, 3)}"
        )
    for key, tensor in found.found.items():
        try:
            refuse_not_finite(key, tensor)
        except ValueError as error:
            raise ValueError(f"model.backbone {source}: {error}") from error
    network.backbone.load_state_dict(found.found, strict=False)
    count = sum(not key.endswith("num_batches_tracked") for key in own)
    return f"backbone: {count} tensors from {source}{found.place.name}{origin}"


def _download_imagenet() -> dict[str, Tensor]:
    """torchvision's weights: from torch's cache, or from where torchvision has them.

    Raises:
        OSError: they can be had from neither; names the address, and where a copy goes.
    """
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    copy = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # torch makes a wrong checksum a RuntimeError
        reason = words(getattr(error, "reason", None) or error)
        raise OSError(
            f"model.backbone imagenet: {weights.url} cannot be had ({reason}); put a copy of that "
            f"file at {copy}, or name it by model.backbone=FILE"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A file's content, and the training that it comes from, where the file names it."""
    if is_address(path):
        raise ValueError(f"model.backbone {path}: an address, expected a file; download it first")
    if not path.is_file():
        raise FileNotFoundError(
            f"model.backbone {path}: no such file; give the path of a ResNet-18 weights file "
            "(resnet18_msceleb.pth in the paper's recipes), 'imagenet', or 'none': a random start"
        )
    try:
        content = read(path)
        if is_ours(content):
            check(path, content, ("objective",))
            return learned(content), ""
    except (ValueError, OSError) as error:
        raise type(error)(f"model.backbone {error}") from error
    origin = ""
    if isinstance(facts := content.get("provenance"), dict):
        wanted = ("run_id", "accuracy", "fingerprint")
        known = {k: ascii(facts[k]).strip("'")[:64] for k in wanted if facts.get(k) is not None}
        origin = f" (provenance: {', '.join(f'{name} {value}' for name, value in known.items())})"
    return content, origin


def _own_backbone(objective: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = NETWORK + "backbone."
    return {k.removeprefix(prefix): v for k, v in objective.items() if k.startswith(prefix)}


def write_backbone(best: Path, *, run_id: str | None) -> Path:
    """Writes the backbone of a checkpoint of ours beside it, in the field's form; returns the file.

    `{'state_dict': …}` in torchvision's names, and `provenance`: MLflow's run, the data's
    fingerprint, the best evaluation's metrics. The classifier is of persons whom nobody else knows:
    in its place stands torchvision's, of 1,000 classes, all zero, for programs that want all names.
    """
    content = load(best)
    own = _own_backbone(learned(content))
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in own.items()}
    tensors |= {
        "fc.weight": torch.zeros(1000, len(own["layer4.1.bn2.weight"])),
        "fc.bias": torch.zeros(1000),
    }
    provenance = {
        "run_id": run_id or content.get("run_id"),
        "fingerprint": content["fingerprint"],
        "identities": len(content["class_names"]),
        "image_size": content["config"]["model"]["image_size"],
        "step": content["step"],
        **content["best"],
    }
    path = best.with_name(BACKBONE)
    save(path, {"state_dict": tensors, "provenance": provenance})
    return path
