"""The configuration: one YAML per experiment, dotted overrides, a strict typed schema.

An unknown key or a value of the wrong type is an error that names it; nothing is ignored.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

REPOSITORY = Path(__file__).resolve().parent.parent

# Keys of earlier versions, in the configurations that checkpoints hold
RENAMED = {"loss.lambda_affinity": "lambda_fcn", "loss.lambda_partition": "lambda_afn"}

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversions (an int is a valid float), no later change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Synthetic(Section):
    """The drawn faces that are packed into `data.shards` on first use."""

    train: Count  # images: of expressions in AffectNet's proportions, of identities evenly
    val: Count  # images, evenly over the classes
    size: Count  # pixels
    seed: Annotated[int, Field(ge=0)] = 0
    by: Literal["expression", "identity"] = "expression"  # what the classes are
    identities: Count = 400  # by identity: persons in training
    held_out: Count = 40  # by identity: other persons, in validation


class Augmentation(Section):
    """What happens to training images (PAPER: one line of its table of recipes)."""

    flip_p: Probability = 0.5
    affine_p: Probability = 0.0
    degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [1.0, 1.0]
    translate: Probability = 0.0  # of the image size
    erase_p: Probability = 0.0
    erase_area: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.02, 0.33]


class Data(Section):
    shards: str  # folder with manifest.json, or its URL; relative to the working folder
    cache: str | None = None  # folder on each node into which the shards are copied first
    classes: list[str] | None = None  # expected names in label order; None takes the manifest's
    val_split: str = "val"
    # task identity: how many pairs of images are drawn from that split, or a file that lists them
    pairs: Annotated[int, Field(ge=20)] = 6000
    pairs_file: str | None = None
    sampling: Literal["balanced", "shuffle"] = "balanced"
    augment: Augmentation = Augmentation()
    max_bad_images: Annotated[int, Field(ge=0)] = 100  # damaged images tolerated on each rank
    threads: Count | None = None  # cores that a rank decodes on; None shares the node's
    synthetic: Synthetic | None = None


class Model(Section):
    image_size: Annotated[int, Field(ge=32, multiple_of=32)] = 224  # pixels
    heads: Annotated[int, Field(ge=0)] = 4  # 0 is the baseline ResNet-18
    backbone: str = "none"  # a weights file or checkpoint, "imagenet", or "none" for a random start
    # a DAN that the whole network starts from, ours or the authors', in place of the backbone
    weights: str | None = None
    weights_classes: str | None = None  # of the authors' files: "affectnet7", "rafdb", or names
    sync_bn: bool = True  # BatchNorm statistics over all ranks


class Loss(Section):
    fcn: Literal["affinity", "center", "none"] = "affinity"
    afn: Literal["partition", "partition_batch", "none"] = "partition"
    lambda_fcn: Annotated[float, Field(ge=0)] = 1.0
    lambda_afn: Annotated[float, Field(ge=0)] = 1.0
    classification: Literal["softmax", "arcface"] = "softmax"  # "arcface" for identities alone
    arcface_s: Positive = 64.0  # scale of its cosines
    arcface_m: Annotated[float, Field(ge=0, lt=1.5)] = 0.5  # its margin, radians


class Optim(Section):
    name: Literal["adam", "sgd"] = "adam"
    lr: Positive = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # SGD's
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Positive | None = None  # of the whole gradient


class Schedule(Section):
    name: Literal["exponential", "step"] = "exponential"
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    every: Count = 1  # epochs from one multiplication by gamma to the next ("step" only)


class Train(Section):
    epochs: Count
    global_batch: Count  # images a step over all ranks; the recipe's constant
    micro_batch: Count | None = None  # images a rank computes at once; None: its whole share
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"  # auto: bf16 where fast
    device: Literal["auto", "cuda", "cpu"] = "auto"
    compile: bool = False
    output: str  # folder for checkpoints; relative to the working folder
    resume: Literal["auto", "never"] = "auto"
    max_steps: Count | None = None  # ends the run early
    keep_checkpoints: Count = 2
    checkpoint_every: Count | None = None  # steps; an epoch's end has one in any case
    checkpoint_minutes: Positive | None = 15.0  # since the last one; None: by steps alone
    checkpoint_errors: Literal["continue", "stop"] = "continue"  # a full disk, say
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0  # of a loss or gradient that is not finite
    log_every: Count = 20  # steps
    timeout_s: Positive = 60.0  # without a step, after which the job ends and names the rank


class EngineChoice(Section):
    """Who does the data-parallel work."""

    name: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1  # of DeepSpeed
    deepspeed: dict[str, Any] = {}  # laid over the DeepSpeed configuration that is derived


class Tracking(Section):
    enabled: bool = True
    experiment: str = "dan_dist"
    run_name: str | None = None
    # a run that holds this one and others of the same name, made by whoever comes first
    parent: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    tags: dict[str, str] = {}  # of the run, beside those that tell data, device and commit


class Config(Section):
    task: Literal["expression", "identity"] = "expression"  # "identity" trains a backbone
    data: Data
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train
    engine: EngineChoice = EngineChoice()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _ranges(self) -> "Config":
        for name in ("scale", "erase_area"):
            low, high = getattr(self.data.augment, name)
            if low > high:
                raise ValueError(f"data.augment.{name}: [{low}, {high}] is not [low, high]")
        if self.model.weights_classes and not self.model.weights:
            raise ValueError("model.weights_classes: only model.weights takes it")
        if self.task == "identity":
            self._only_a_backbone()
        elif self.loss.classification == "arcface":
            raise ValueError("loss.classification: only task=identity takes arcface")
        elif self.data.pairs_file:
            raise ValueError("data.pairs_file: only task=identity takes it")
        if self.engine.name == "deepspeed" and self.train.precision == "float64":
            raise ValueError("train.precision: float64 needs engine.name=ddp")
        if self.schedule.name == "exponential" and self.schedule.every != 1:
            raise ValueError("schedule.every: only schedule.name=step takes it")
        return self

    def _only_a_backbone(self) -> None:
        """Identities train a ResNet-18 and its classifier: what DAN adds has no place there."""
        for key, value, wanted in (
            ("model.heads", self.model.heads, 0),
            ("model.weights", self.model.weights, None),
            ("loss.fcn", self.loss.fcn, "none"),
            ("loss.afn", self.loss.afn, "none"),
        ):
            if value != wanted:
                text = "null" if wanted is None else wanted
                raise ValueError(f"task identity trains a backbone: {key} must be {text}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: the 1.1 of PyYAML reads 1e-4 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, changed by `section.key=value` overrides.

    A relative path is looked for in the working folder, then in the repository.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable YAML, an unknown key, a wrong type or value; one line that names it.
    """
    found = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: no such configuration, here or in {REPOSITORY}")
    tree = _parse(found.read_text(encoding="utf-8"), str(found))
    if not isinstance(tree, dict):
        raise ValueError(f"{found}: expected sections of keys, found {tree!r}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override '{override}': expected section.key=value")
        _set(tree, key, _parse(text, override))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{found}: {_explain(error)}") from error


def resolve(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a checkpoint holds it, flat; keys that it did not know have their default.

    Raises:
        ValueError: it is none of ours; one line that names the key.
    """
    loss = {RENAMED.get(f"loss.{k}", k): v for k, v in tree.get("loss", {}).items()}
    try:
        return flatten(Config.model_validate({**tree, "loss": loss}).model_dump())
    except ValidationError as error:
        raise ValueError(_explain(error)) from error


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration (`Config.model_dump()`) as {"section.key": value}."""
    flat: dict[str, Any] = {}

    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def _explain(error: ValidationError) -> str:
    """The first fault in one line: where, what was found, what was expected."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    name = ".".join(where)
    if first["type"] == "extra_forbidden":
        known = list(_schema_at(where[:-1]))
        near = difflib.get_close_matches(where[-1], known, 1, cutoff=0.5)
        hint = f"did you mean '{'.'.join([*where[:-1], near[0]])}'?" if near else ""
        return f"unknown key '{name}'; {hint or 'known are ' + ', '.join(known)}"
    if first["type"] == "missing":
        return f"'{name}' is missing"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    return f"{name} is {first['input']!r}: {first['msg'][0].lower() + first['msg'][1:]}"


def _schema_at(path: Sequence[str]) -> dict[str, Any]:
    section: Any = Config
    for name in path:
        kinds = getattr(section.model_fields[name].annotation, "__args__", None)
        section = kinds[0] if kinds else section.model_fields[name].annotation
    fields: dict[str, Any] = section.model_fields
    return fields
