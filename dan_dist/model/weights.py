"""Trained networks from files: our checkpoints, and the authors' DAN. No code in them is run."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from dan_dist.model.authors import AUTHORS_SIZE, read_authors
from dan_dist.model.classes import check_names, class_order, columns_of, join_names
from dan_dist.model.dan import DAN
from dan_dist.model.state_dict import fill_network, is_count
from dan_dist.run.checkpoint import BEST, FORMAT, NETWORK, learned, read
from shards.files import read_regular
from shards.kinds import HEAD_BYTES, ONNX, ZIP, begins_as_picture, describe

Which = Literal["auto", "average", "trained"]  # of a checkpoint's weights


class Trained(NamedTuple):
    """A network with its weights, and its file's facts about it."""

    path: Path
    network: DAN  # on the CPU, in evaluation mode, float64 where the file is, else float32
    class_names: tuple[str, ...]
    image_size: int  # pixels
    step: int  # optimiser steps; in the authors' files, epochs
    config: dict[str, Any]  # of the training; empty in the authors' files
    run_id: str | None  # MLflow's, of the training

    @property
    def name(self) -> str:
        """The training's name, after its folder; of the authors' files, the file's."""
        return Path(self.config["train"]["output"]).name if self.config else self.path.stem

    @property
    def task(self) -> str:
        """The task that it was trained on: "expression" or "identity"."""
        return str(self.config.get("task", "expression"))

    @property
    def experiment(self) -> str:
        """MLflow's, of the training."""
        return str(self.config["tracking"]["experiment"]) if self.config else "dan_dist"


def load_trained(
    path: Path, classes: str | None = None, *, task: str | None = "expression",
    weights: Which = "auto",
) -> Trained:  # fmt: skip
    """The network of one of our checkpoints, of a run's folder (its best), or of the authors' file.

    task: the one that it must have been trained on, "expression" or "identity"; None takes both.

    classes: the authors' files do not name theirs; see `class_order`. Theirs of eight classes are
    AffectNet's. weights: the average of a training that kept one (`optim.ema`), or those of its
    last step; "auto" takes the average where there is one, as the training's evaluations did.

    A file that is none of these, or damaged, is a ValueError that names it.
    """
    path = path / BEST if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    check_kind(path)
    content = read(path)
    if content.get("format") != FORMAT:
        if weights == "average":
            raise ValueError(f"{path} holds no average of the weights")
        network, names, epochs = read_authors(path, content, classes)
        return Trained(path, network, names, AUTHORS_SIZE, epochs, {}, None)
    try:
        trained = _ours(path, content, weights)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error!r})") from error
    if task not in (None, trained.task):
        raise ValueError(
            f"{path} was trained on task {trained.task}, expected {task}; evaluate judges it, and "
            f"model.backbone={path} starts a training from it"
        )
    if classes is not None and class_order(classes) != trained.class_names:
        raise ValueError(
            f"{path} has the classes {join_names(trained.class_names)}, not those of '{classes}'"
        )
    return trained


def check_kind(path: Path) -> None:
    """ValueError: a file that is something else than weights, by its first bytes; says what."""
    head = read_regular(path, HEAD_BYTES, cut=True)
    if begins_as_picture(head):
        raise ValueError(f"{path}: a picture, expected a checkpoint; images are named after it")
    kind = describe(head, path.name)
    if kind == ONNX:
        kind += "; name the checkpoint that it was exported from"
    if kind and not kind.startswith(ZIP):
        raise ValueError(f"{path}: expected a checkpoint, this is {kind}")


def _ours(path: Path, content: dict[str, Any], weights: Which) -> Trained:
    """A checkpoint of ours, which may come from anywhere: every value is checked before use."""
    names, model, step = content["class_names"], content["config"]["model"], content["step"]
    check_names(names, str(path))
    size, heads = model["image_size"], model["heads"]
    if not (is_count(size) and size and size % 32 == 0 and is_count(heads) and is_count(step)) or (
        heads > len(content["objective"])  # a number alone is to make no network of any size
    ):
        raise ValueError(f"{path}: image_size {size!r}, heads {heads!r}, step {step!r}")
    for section, key in (("data", "val_split"), ("train", "precision"), ("train", "output"),
                         ("tracking", "experiment"), ("loss", "fcn")):  # fmt: skip
        if not isinstance(value := content["config"][section][key], str):
            raise ValueError(f"{path}: {section}.{key} is {value!r}")
    is_identity = content["config"].get("task") == "identity"
    if is_identity and not is_count(pairs := content["config"]["data"]["pairs"]):
        raise ValueError(f"{path}: data.pairs is {pairs!r}")
    if weights == "average" and "average" not in content:
        raise ValueError(f"{path} holds no average of the weights; optim.ema keeps one")
    tensors = learned(content, average=weights != "trained")
    own = {k.removeprefix(NETWORK): v for k, v in tensors.items() if k.startswith(NETWORK)}
    is_cosine = content["config"]["loss"].get("classification") == "arcface"
    network = fill_network(len(names), heads, own, str, path, cosine=is_cosine)
    return Trained(
        path, network, tuple(names), size, step, content["config"], content.get("run_id")
    )


def load_weights(network: DAN, class_names: tuple[str, ...], source: str,
                 classes: str | None = None) -> str:  # fmt: skip
    """Starts the whole network from a file that `load_trained` reads; returns a line on it.

    The classifier follows the classes by name, wherever they stand; where the file knows other
    classes, it stays as it is. Another number of heads is a ValueError.
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
        end = f"classifier: fresh, as the file's classes are {join_names(trained.class_names)}"
    else:
        state |= {k: state[k][columns] for k in ending if state[k].ndim}
        end = "classifier and all"
    network.load_state_dict(state, strict=False)
    return f"network: from {trained.path}, {end}"
