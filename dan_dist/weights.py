"""Weights from files: our checkpoints, the authors' DAN, a ResNet-18. No code in them is run.

And into one: the backbone that a training on identities leaves.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from dan_dist import checkpoint
from dan_dist.config import REPOSITORY, load_config
from dan_dist.model import CHANNELS, DAN

PREFIXES = ("module.", "_orig_mod.", "backbone.")
BACKBONE = "backbone.pth"
OWN = "network."  # in our checkpoints, the network among the objective's tensors
ORDERS = ("affectnet8", "affectnet7", "rafdb", "sfew")  # configurations that name their classes
SYNONYMS = {"happiness": "happy", "sadness": "sad", "angry": "anger"}  # as data sets call them
AUTHORS_SIZE = 224  # pixels

# Our names for the parts of DAN → the authors'
_STAGES = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
_SPATIAL = {"reduce": "conv1x1", "square": "conv_3x3", "wide": "conv_1x3", "tall": "conv_3x1"}


class Trained(NamedTuple):
    """A network with its weights, and what its file says of it."""

    path: Path
    network: DAN  # on the CPU, in evaluation mode, float64 where the file is, else float32
    class_names: tuple[str, ...]
    image_size: int  # pixels
    step: int  # optimiser steps; in the authors' files, epochs
    config: dict[str, Any]  # of the training; empty in the authors' files
    run_id: str | None  # MLflow's, of the training

    @property
    def name(self) -> str:
        """What the training was called; of the authors' files, theirs."""
        return Path(self.config["train"]["output"]).name if self.config else self.path.stem

    @property
    def task(self) -> str:
        """What it was trained on: "expression" or "identity"."""
        return str(self.config.get("task", "expression"))

    @property
    def experiment(self) -> str:
        """MLflow's, of the training."""
        return str(self.config["tracking"]["experiment"]) if self.config else "dan_dist"


def load_trained(
    path: Path, classes: str | None = None, *, task: str | None = "expression"
) -> Trained:
    """The network of one of our checkpoints, of a run's folder (its best), or of the authors' file.

    task: what it must have been trained on, "expression" or "identity"; None takes both.

    classes: the authors' files do not name theirs; see `class_order`. Theirs of eight classes are
    AffectNet's.

    Raises:
        FileNotFoundError: no such file. OSError: it cannot be read.
        ValueError: damaged, neither of the two, too few of its keys match, or its classes are not
            known.
    """
    path = path / checkpoint.BEST if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content = checkpoint.read(path)
    if content.get("format") != checkpoint.FORMAT:
        return _authors(path, content, classes)
    try:
        trained = _ours(path, content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error!r})") from error
    if task not in (None, trained.task):
        raise ValueError(
            f"{path} was trained on task {trained.task}, expected {task}; evaluate judges it, and "
            f"model.backbone={path} starts a training from it"
        )
    if classes is not None and class_order(classes) != trained.class_names:
        raise ValueError(
            f"{path} has the classes {listed(trained.class_names)}, not those of '{classes}'"
        )
    return trained


def _ours(path: Path, content: dict[str, Any]) -> Trained:
    """A checkpoint of ours, which may have been made elsewhere: what is used of it is looked at."""
    names, model, step = content["class_names"], content["config"]["model"], content["step"]
    _check_names(names, str(path))
    size, heads = model["image_size"], model["heads"]
    if not (_whole(size) and size and size % 32 == 0 and _whole(heads) and _whole(step)) or (
        heads > len(content["objective"])  # a number alone is to make no network of any size
    ):
        raise ValueError(f"{path}: image_size {size!r}, heads {heads!r}, step {step!r}")
    for section, key in (("data", "val_split"), ("train", "precision"), ("train", "output"),
                         ("tracking", "experiment"), ("loss", "fcn")):  # fmt: skip
        if not isinstance(value := content["config"][section][key], str):
            raise ValueError(f"{path}: {section}.{key} is {value!r}")
    is_identity = content["config"].get("task") == "identity"
    if is_identity and not _whole(pairs := content["config"]["data"]["pairs"]):
        raise ValueError(f"{path}: data.pairs is {pairs!r}")
    own = {k.removeprefix(OWN): v for k, v in content["objective"].items() if k.startswith(OWN)}
    is_cosine = content["config"]["loss"].get("classification") == "arcface"
    network = _fill(len(names), heads, own, str, path, cosine=is_cosine)
    return Trained(
        path, network, tuple(names), size, step, content["config"], content.get("run_id")
    )


def _authors(path: Path, content: dict[str, Any], classes: str | None) -> Trained:
    """The authors' `{'iter', 'model_state_dict', …}`, or the bare tensors of it."""
    tensors = _tensors(content)
    count = len(tensors["fc.bias"]) if tensors.get("fc.bias", torch.empty(())).ndim else 1
    heads = {found[0] for key in tensors if (found := re.match(r"cat_head\d+\.", key))}
    network = _fill(count, len(heads) or 4, tensors, _authors_name, path)
    order = classes or ("affectnet8" if count == 8 else None)
    if order is None:
        raise ValueError(
            f"{path} is of the authors' format, which does not name its {count} classes: say whose "
            f"order it is by --classes (in a training, model.weights_classes): one of "
            f"{', '.join(ORDERS)}, or the names with commas"
        )
    names = class_order(order)
    if len(names) != count:
        raise ValueError(f"{path} has {count} classes, '{order}' has {len(names)}")
    epochs: Any = content.get("iter")
    step = epochs if _whole(epochs) and epochs < 2**31 else 0
    return Trained(path, network, names, AUTHORS_SIZE, step, {}, None)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_names(names: Any, where: str) -> None:
    """Raises ValueError for what is not a list of different names."""
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{where}: classes {names!r}, expected names")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"{where}: classes {listed(names)}: a name stands there twice, or none")


def _authors_name(key: str) -> str:
    """What the authors' release calls a tensor of ours."""
    part, _, rest = key.partition(".")
    if part == "backbone":
        stage, _, rest = rest.partition(".")
        return f"features.{_STAGES[stage]}.{rest}"
    if part == "heads":
        number, kind, module, rest = rest.split(".", 3)
        inner = f"sa.{_SPATIAL[module]}" if kind == "spatial" else "ca.attention"
        return f"cat_head{number}.{inner}.{rest}"
    return {"classifier": "fc", "logit_norm": "bn"}[part] + f".{rest}"


def class_order(classes: str) -> tuple[str, ...]:
    """Class names in label order: those of a configuration in `configs/`, or names with commas.

    Raises:
        ValueError: neither, or a name stands there twice.
    """
    if "," in classes:
        given = [name.strip() for name in classes.split(",")]
        _check_names(given, classes)
        return tuple(given)
    if classes not in ORDERS:
        raise ValueError(f"classes '{classes}': expected {', '.join(ORDERS)}, or names with commas")
    names = load_config(REPOSITORY / "configs" / f"{classes}.yaml").data.classes
    assert names is not None
    return tuple(names)


def columns_of(class_names: tuple[str, ...], wanted: tuple[str, ...]) -> list[int] | None:
    """Where each of the `wanted` classes stands in `class_names`; None where the sets differ.

    Data sets order their classes differently, and call some of them differently (SYNONYMS).
    """
    own, other = list(class_names), list(wanted)
    if set(own) != set(other):
        own, other = ([SYNONYMS.get(n, n) for n in names] for names in (own, other))
    if len(set(own)) < len(own) or sorted(own) != sorted(other):
        return None
    return [own.index(name) for name in other]


def load_weights(network: DAN, class_names: tuple[str, ...], source: str,
                 classes: str | None = None) -> str:  # fmt: skip
    """Starts the whole network from a file that `load_trained` reads; returns a line on it.

    The classifier follows the classes by name, wherever they stand; where the file knows other
    classes, it stays as it is.

    Raises:
        as `load_trained`; ValueError: another number of heads.
    """
    try:
        trained = load_trained(Path(source), classes)
    except (ValueError, OSError) as error:
        raise type(error)(f"model.weights {error}") from error
    if len(trained.network.heads) != len(network.heads):
        raise ValueError(
            f"model.weights {source} has {len(trained.network.heads)} heads, model.heads is "
            f"{len(network.heads)}"
        )
    state = trained.network.state_dict()
    ending = [k for k in state if k.startswith(("classifier.", "logit_norm."))]
    columns = columns_of(trained.class_names, class_names)
    if columns is None:
        state = {k: v for k, v in state.items() if k not in ending}
        end = f"classifier: fresh, as the file's classes are {listed(trained.class_names)}"
    else:
        state |= {k: state[k][columns] for k in ending if state[k].ndim}
        end = "classifier and all"
    network.load_state_dict(state, strict=False)
    return f"network: from {trained.path}, {end}"


def load_backbone(network: DAN, source: str) -> str:
    """Starts the backbone from `source`: "none", "imagenet" (torchvision's weights) or a file.

    A file holds a ResNet-18 in torchvision's names, bare or under 'state_dict', 'model_state_dict'
    or 'model', with or without a 'module.' prefix; its classifier is left out. Or it is one of our
    own checkpoints, or of the authors', of which the backbone is taken. Only tensors are read.
    Returns one line that says what was loaded.

    Raises:
        FileNotFoundError: the file does not exist (the message names the choices).
        ValueError: not a readable weights file, or keys or shapes are not ResNet-18's.
    """
    if source == "none":
        return "backbone: random start"
    origin = ""
    if source == "imagenet":
        weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        state = weights.get_state_dict(progress=False, check_hash=True)
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


def _read_backbone(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, and what the file says of the training that they come from."""
    if not path.is_file():
        raise FileNotFoundError(
            f"model.backbone {path}: no such file; give the path of a ResNet-18 weights file "
            "(resnet18_msceleb.pth in the paper's recipes), 'imagenet', or 'none': a random start"
        )
    try:
        content = checkpoint.read(path)
    except (ValueError, OSError) as error:
        raise type(error)(f"model.backbone {error}") from error
    if isinstance(own := content.get("objective"), dict):  # one of our checkpoints
        return _own_backbone(own), ""
    tensors, origin = _tensors(content), ""
    if isinstance(said := content.get("provenance"), dict):
        wanted = ("run_id", "accuracy", "fingerprint")
        known = {k: ascii(said[k]).strip("'")[:64] for k in wanted if said.get(k) is not None}
        origin = f" (it says: {', '.join(f'{name} {value}' for name, value in known.items())})"
    if not any(key.startswith("features.0.") for key in tensors):
        return tensors, origin
    names = DAN(1, 0).backbone.state_dict()
    theirs = {name: _authors_name(f"backbone.{name}") for name in names}
    return {name: tensors[key] for name, key in theirs.items() if key in tensors}, origin


def _own_backbone(objective: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = OWN + "backbone."
    return {k.removeprefix(prefix): v for k, v in objective.items() if k.startswith(prefix)}


def write_backbone(best: Path, *, run_id: str | None) -> Path:
    """Writes the backbone of a checkpoint of ours beside it, in the field's form; returns the file.

    `{'state_dict': …}` in torchvision's names, and `provenance`: MLflow's run, the data's
    fingerprint, what was measured. The classifier is of persons whom nobody else knows: in its
    place stands torchvision's, of 1,000 classes, all zero, for programs that want all names.

    Raises:
        ValueError, OSError: the checkpoint cannot be read, or the file not be written.
    """
    content = checkpoint.load(best)
    own = _own_backbone(content["objective"])
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
    checkpoint.save(path, {"state_dict": tensors, "provenance": provenance})
    return path


def _tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The named tensors, bare or under the field's usual keys, without wrappers' prefixes."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(name), dict):
            content = content[name]
    return {_strip(str(k)): v for k, v in content.items() if isinstance(v, Tensor)}


def _strip(key: str) -> str:
    while (prefix := next((p for p in PREFIXES if key.startswith(p)), None)) is not None:
        key = key.removeprefix(prefix)
    return key


def _fill(
    classes: int, heads: int, tensors: dict[str, Tensor], name_of: Callable[[str], str], path: Path,
    *, cosine: bool = False,
) -> DAN:  # fmt: skip
    """A network that has all of its tensors from a file; `name_of` says what that calls one.

    Raises:
        ValueError: some are missing, of another shape or kind, or too many; lists them.
    """
    with torch.device("meta"):  # no memory: the file's tensors become the network's
        network = DAN(classes, heads, cosine=cosine)
    own = network.state_dict()
    names = {k: name_of(k) for k in own}
    found = {k: tensors[n] for k, n in names.items() if n in tensors}
    counters = [k for k in own if k.endswith("num_batches_tracked")]  # not in all files
    wanted = [k for k in own if k in found or k not in counters]
    missing = [names[k] for k in wanted if k not in found or not _fits(found[k], own[k])]
    extra = sorted(tensors.keys() - names.values())
    if missing or extra:
        raise ValueError(
            f"{path}: neither a checkpoint of this project nor the authors' DAN: "
            f"{len(wanted) - len(missing)} of {len(wanted)} tensors match; missing or of another "
            f"shape: {listed(missing, 5)}; unknown: {listed(extra, 5)}"
        )
    double = any(tensor.dtype == torch.float64 for tensor in found.values())
    dtype = torch.float64 if double else torch.float32
    state = {k: torch.tensor(0) for k in counters}
    state |= {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def _fits(tensor: Any, wanted: Tensor) -> bool:
    """Whether it may stand in for a tensor of the network, and holds as much as it says."""
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == wanted.shape
        and tensor.is_floating_point() == wanted.is_floating_point()
        and not tensor.is_complex()
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def listed(keys: Sequence[str], most: int = 10) -> str:
    """Names as text, however many they are."""
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return (", ".join(keys[:most]) or "none") + rest
