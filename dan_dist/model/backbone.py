"""ResNet-18 backbones: read from files of many kinds, written by a training on identities."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor

from dan_dist.model.authors import authors_name
from dan_dist.model.dan import CHANNELS, DAN
from dan_dist.model.state_dict import named_tensors
from dan_dist.run.checkpoint import NETWORK, learned, load, read, save
from shards.command import words

BACKBONE = "backbone.pth"


def load_backbone(network: DAN, source: str) -> str:
    """Starts the backbone from `source`: "none", "imagenet" (torchvision's weights) or a file.

    A file holds a ResNet-18 in torchvision's names, bare or under 'state_dict', 'model_state_dict'
    or 'model', with or without a 'module.' prefix; its classifier is left out. Or it is one of our
    own checkpoints, or of the authors', of which the backbone is taken. Only tensors are read.
    Returns a log line on what was loaded.
    """
    if source == "none":
        return "backbone: random start"
    origin = ""
    if source == "imagenet":
        state = _download_imagenet()
    else:
        state, origin = _read_backbone(Path(source))
    own = network.backbone.state_dict()
    found = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    wanted = [k for k in own if not k.endswith("num_batches_tracked")]
    missing = [k for k in wanted if k not in found]
    if missing:
        raise ValueError(
            f"model.backbone {source}: {len(wanted) - len(missing)} of {len(wanted)} ResNet-18 "
            f"tensors match; missing or of another shape: {', '.join(missing[:3])} …"
        )
    extra = [k for k in state if k not in own and not k.startswith("fc.")]
    if extra:
        raise ValueError(
            f"model.backbone {source}: more than a ResNet-18: {', '.join(extra[:3])} …"
        )
    network.backbone.load_state_dict(found, strict=False)
    return f"backbone: {len(wanted)} tensors from {source}{origin}"


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


def _read_backbone(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the training that they come from, where the file names it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"model.backbone {path}: no such file; give the path of a ResNet-18 weights file "
            "(resnet18_msceleb.pth in the paper's recipes), 'imagenet', or 'none': a random start"
        )
    try:
        content = read(path)
    except (ValueError, OSError) as error:
        raise type(error)(f"model.backbone {error}") from error
    if isinstance(content.get("objective"), dict):  # one of our checkpoints
        return _own_backbone(learned(content)), ""
    tensors, origin = named_tensors(content), ""
    if isinstance(facts := content.get("provenance"), dict):
        wanted = ("run_id", "accuracy", "fingerprint")
        known = {k: ascii(facts[k]).strip("'")[:64] for k in wanted if facts.get(k) is not None}
        origin = f" (provenance: {', '.join(f'{name} {value}' for name, value in known.items())})"
    if not any(key.startswith("features.0.") for key in tensors):
        return tensors, origin
    names = DAN(1, 0).backbone.state_dict()
    theirs = {name: authors_name(f"backbone.{name}") for name in names}
    return {name: tensors[key] for name, key in theirs.items() if key in tensors}, origin


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
    tensors |= {"fc.weight": torch.zeros(1000, CHANNELS), "fc.bias": torch.zeros(1000)}
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
