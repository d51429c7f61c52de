"""Trained networks from files: our checkpoints, and the authors' DAN. No code in them is run."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dan_dist.data.photographs import cut_of_shards
from dan_dist.data.splits import selected_on
from dan_dist.model.authors import AUTHORS_SIZE, read_authors
from dan_dist.model.classes import check_names, class_order, columns_of, join_names
from dan_dist.model.dan import DAN, WIDTH, Fusion
from dan_dist.model.state_dict import fill_network
from dan_dist.options import Precision
from dan_dist.run.checkpoint import BEST, NETWORK, check, is_ours, learned, read
from dan_dist.schema import LEAST_WIDTH, MOST_HEADS, MOST_PIXELS, MOST_WIDTH
from shards.command import escape
from shards.files import is_address, read_regular
from shards.kinds import HEAD_BYTES, ONNX, ZIP, begins_as_picture, describe

Which = Literal["auto", "average", "trained"]  # of a checkpoint's weights


class _Known(BaseModel):
    """Keys that a checkpoint's configuration must hold; it may be another version's."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Model(_Known):
    image_size: Annotated[int, Field(ge=32, le=MOST_PIXELS, multiple_of=32)]
    heads: Annotated[int, Field(ge=0, le=MOST_HEADS)]
    width: Annotated[int, Field(ge=LEAST_WIDTH, le=MOST_WIDTH, multiple_of=2)] = WIDTH
    fusion: Fusion = "log_softmax"


class _Data(_Known):
    val_split: str
    pairs: Annotated[int, Field(ge=0)] | None = None


class _Loss(_Known):
    fcn: Literal["affinity", "center", "none"]
    classification: str = "softmax"


class _Train(_Known):
    precision: Precision
    output: str


class _Tracking(_Known):
    experiment: str


class _Facts(_Known):
    """What an evaluation uses of the training's configuration."""

    task: Literal["expression", "identity"] = "expression"
    model: _Model
    data: _Data
    loss: _Loss
    train: _Train
    tracking: _Tracking


class Trained(NamedTuple):
    """A network with its weights, and its file's facts about it."""

    path: Path
    network: DAN  # on the CPU, in evaluation mode, float64 where the file is, else float32
    class_names: tuple[str, ...]
    image_size: int  # pixels
    step: int  # optimiser steps; in the authors' files, epochs
    config: dict[str, Any]  # of the training; empty in the authors' files
    run_id: str | None  # MLflow's, of the training
    # sets, fingerprint, face_cut, its own evaluation and the best one and their images, if any;
    # has_average; other_weights: these evaluations were of the average of the weights, not of these
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """The training's name, after its folder; of the authors' files, the file's."""
        return escape(Path(self.config["train"]["output"]).name if self.config else self.path.stem)

    @property
    def age(self) -> str:
        """The epoch of the best checkpoint and of the authors' files; the step of others."""
        best = self.facts.get("best", {})
        if not self.config:
            return f"epoch {self.step}"
        if self.path.name == BEST and "epoch" in best:
            return f"epoch {best['epoch']:g}"
        return f"step {self.step}"

    @property
    def task(self) -> str:
        """The task that it was trained on: "expression" or "identity"."""
        return str(self.config.get("task", "expression"))

    @property
    def experiment(self) -> str:
        """MLflow's, of the training."""
        return str(self.config["tracking"]["experiment"]) if self.config else "dan_dist"

    @property
    def face_cut(self) -> str | None:
        """How the training's faces were cut (`shards.cut`); None: neither file nor set tells."""
        if self.facts.get("face_cut") is not None:
            return str(self.facts["face_cut"])
        folder = self.config["data"].get("shards") if self.config else None
        if not isinstance(folder, str):
            return None
        return cut_of_shards(folder, str(self.facts.get("fingerprint")))

    @property
    def selected_on(self) -> str:
        """What chose these weights: holdout, val or test, on which the authors chose theirs."""
        return selected_on(self.config["data"]) if self.config else "test"


def load_trained(
    path: Path, classes: str | None = None, *, task: str | None = "expression",
    weights: Which = "auto",
) -> Trained:  # fmt: skip
    """The network of one of our checkpoints, of a run's folder (its best), or of another file.

    Other files hold all tensors of a DAN in the authors' names, or in ours (`read_authors`).

    task: the one that it must have been trained on, "expression" or "identity"; None takes both.

    classes: the authors' files do not name theirs; see `class_order`. Theirs of eight classes are
    AffectNet's. weights: the average of a training that kept one (`optim.ema`), or those of its
    last step; "auto" takes the average where there is one, as the training's evaluations did.

    Raises:
        ValueError: the file is none of these, or damaged; whatever could stop or spoil its use is
            found here, before any work. OSError: it cannot be read.
    """
    path = path / BEST if path.is_dir() else path
    if not path.is_file():
        if is_address(path):
            raise ValueError(f"{path}: an address, expected a checkpoint; download the file first")
        raise FileNotFoundError(f"{path}: no such checkpoint")
    check_kind(path)
    content = read(path)
    if not is_ours(content):
        if weights == "average":
            raise ValueError(f"{path} holds no average of the weights")
        network, names, epochs = read_authors(path, content, classes)
        return Trained(path, network, names, AUTHORS_SIZE, epochs, {}, None, {})
    trained = _ours(path, content, weights)
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
    check(path, content, ("step", "config", "class_names", "objective"))
    names = content["class_names"]
    check_names(names, str(path))
    try:
        known = _Facts.model_validate(content["config"])
    except ValidationError as error:
        first = error.errors()[0]
        where, found = ".".join(map(str, first["loc"])), ascii(first["input"])[:80]
        raise ValueError(f"{path}: config.{where} is {found}: {first['msg']}") from error
    if known.task == "identity" and known.data.pairs is None:
        raise ValueError(f"{path}: config.data.pairs is missing")
    if weights == "average" and "average" not in content:
        raise ValueError(f"{path} holds no average of the weights; optim.ema keeps one")
    tensors = learned(content, average=weights != "trained")
    own = {k.removeprefix(NETWORK): v for k, v in tensors.items() if k.startswith(NETWORK)}
    facts: dict[str, Any] = {
        key: content[key] for key in ("sets", "fingerprint", "best", "face_cut") if key in content
    }
    facts["has_average"] = "average" in content
    if content.get("evaluated") == content["step"]:
        facts["evaluation"] = content["metrics"]
    if isinstance(right := content.get("right"), Tensor):
        facts["images"] = right.numel()
    if weights == "trained" and "average" in content:
        facts["other_weights"] = True
    network = fill_network(
        len(names), known.model.heads, own, path, width=known.model.width,
        cosine=known.loss.classification == "arcface", fusion=known.model.fusion,
    )  # fmt: skip
    return Trained(
        path, network, tuple(names), known.model.image_size, content["step"], content["config"],
        content.get("run_id"), facts,
    )  # fmt: skip


def load_weights(network: DAN, class_names: tuple[str, ...], source: str,
                 classes: str | None = None) -> str:  # fmt: skip
    """Starts the whole network from a file that `load_trained` reads; returns a line on it.

    The classifier follows the classes by name, wherever they stand; where the file knows other
    classes, it stays as it is. Another number of heads, or another width, is a ValueError.
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
    if trained.network.width != network.width:
        raise ValueError(
            f"model.weights {source} has width {trained.network.width}, model.width is "
            f"{network.width}"
        )
    fused = ""
    if trained.network.fusion != network.fusion:
        fused = f"; its heads were fused by {trained.network.fusion}, here by {network.fusion}"
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
    return f"network: from {trained.path}, {end}{fused}"
