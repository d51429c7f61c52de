"""The configuration's schema: every key with its type, its default and what it means."""

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dan_dist.data_schema import Data
from dan_dist.values import (
    Amount,
    Count,
    Part,
    PathText,
    Positive,
    Probability,
    Section,
    Seed,
    Weight,
)

MOST_PIXELS, MOST_HEADS = 1024, 64  # beyond them memory ends, not learning
LEAST_WIDTH, MOST_WIDTH = 8, 128


class Model(Section):
    """The network, and what its weights start from."""

    image_size: int = Field(
        default=224,
        ge=32,
        le=MOST_PIXELS,
        multiple_of=32,
        description="side of the network's input in pixels",
    )
    heads: int = Field(
        default=4, ge=0, le=MOST_HEADS, description="attention heads; 0 is the baseline ResNet-18"
    )
    width: int = Field(
        default=64,
        ge=LEAST_WIDTH,
        le=MOST_WIDTH,
        multiple_of=2,
        description="channels of ResNet-18's first stage, an eighth of its last one's; files of "
        "weights have 64, fewer are for tries on a CPU",
    )
    fusion: Literal["log_softmax", "mean"] = Field(
        default="log_softmax",
        description="what the classifier sees of several heads: the sum of their log-softmax, as "
        "in the paper, or their mean",
    )
    backbone: Literal["none"] | PathText = Field(
        default="none",
        description="start of the ResNet-18: a weights file or checkpoint, 'imagenet', or "
        "'none': at random",
    )
    weights: PathText | None = Field(
        default=None,
        description="start of the whole network, in place of the backbone: a DAN of ours or "
        "of the authors",
    )
    weights_classes: str | None = Field(
        default=None,
        description="classes of the authors' file: affectnet7, rafdb, …, or names with commas",
    )
    sync_bn: bool = Field(default=True, description="BatchNorm statistics over all ranks")


class Loss(Section):
    """The three parts of the loss."""

    fcn: Literal["affinity", "center", "none"] = Field(
        default="affinity", description="loss of the feature clustering network"
    )
    afn: Literal["partition", "partition_release", "none"] = Field(
        default="partition",
        description="loss of the attention fusion network: per image as in the paper, "
        "or one logarithm for the batch as in the authors' release",
    )
    lambda_fcn: Weight = Field(default=1.0, description="weight of loss.fcn")
    lambda_afn: Weight = Field(default=1.0, description="weight of loss.afn")
    classification: Literal["softmax", "soft", "arcface"] = Field(
        default="softmax",
        description="loss of the classifier: cross-entropy with the label, or with the votes or "
        "soft labels of the release; arcface for task identity alone",
    )
    arcface_s: Positive = Field(default=64.0, description="arcface: scale of the cosines")
    arcface_m: float = Field(default=0.5, ge=0, lt=1.5, description="arcface: margin in radians")
    label_smoothing: Part = Field(
        default=0.0, description="part of a label spread over all classes"
    )

    @field_validator("afn", mode="before")
    @classmethod
    def _has_another_name(cls, value: Any) -> Any:
        if value == "partition_batch":
            raise ValueError(
                "loss.afn: partition_batch has gone; the form of the authors' release is "
                "partition_release, whose variance is averaged over the channels as well"
            )
        return value


class Optim(Section):
    """The optimiser."""

    name: Literal["adam", "adamw", "sgd"] = Field(default="adam", description="the optimiser")
    lr: Positive = Field(default=1e-4, description="highest learning rate; see schedule.lr_rule")
    momentum: Part = Field(default=0.9, description="momentum of sgd")
    nesterov: bool = Field(default=False, description="sgd: with Nesterov's momentum")
    weight_decay: Weight = Field(default=0.0, description="weight decay; adamw: decoupled")
    decay: Literal["all", "weights"] = Field(
        default="all", description="what decays: all, or not BatchNorm, biases and class centres"
    )
    backbone_lr: Weight = Field(default=1.0, description="the backbone's part of lr; 0 freezes it")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="decay of the weights' average, which is evaluated; null: none"
    )
    clip_norm: Positive | None = Field(
        default=None, description="largest norm of the whole gradient; null clips nothing"
    )


class Schedule(Section):
    """The learning rate over the epochs."""

    name: Literal["exponential", "step", "cosine"] = Field(
        default="exponential",
        description="multiplied by gamma each epoch, or each `every` epochs; or half a cosine",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="factor of the learning rate")
    every: Count = Field(default=1, description="step: epochs from one multiplication to the next")
    floor: Probability = Field(default=0.0, description="cosine: where it ends, in parts of lr")
    warmup_steps: Amount = Field(default=0, description="steps over which lr rises from 0 first")
    warmup_epochs: Weight = Field(default=0.0, description="the same in epochs")
    lr_rule: Literal["fixed", "linear", "sqrt"] = Field(
        default="fixed", description="how lr grows with train.global_batch ÷ reference_batch"
    )
    reference_batch: Count = Field(default=256, description="images a step that optim.lr is for")


class Train(Section):
    """The run: its length, its batch, its device, its checkpoints."""

    epochs: int = Field(
        ge=1, le=1_000_000, description="epochs, each of as many images as the training split has"
    )
    global_batch: int = Field(
        ge=1,
        le=1_000_000,
        description="images a step over all ranks: the recipe's constant on any number of GPUs",
    )
    micro_batch: Count | None = Field(
        default=None,
        description="images that a rank computes at once; null: its whole share of a step",
    )
    select: Literal["accuracy", "mean_recall", "macro_f1"] = Field(
        default="accuracy", description="metric that chooses the best epoch"
    )
    patience: Count | None = Field(
        default=None,
        description="epochs without a better one after which the run ends; null: all epochs",
    )
    seed: Seed = Field(
        default=0, description="of the start, the order, the augmentation and the held-out images"
    )
    precision: Literal["auto", "float32", "tf32", "bf16", "fp16", "float64"] = Field(
        default="auto",
        description="of the arithmetic; auto: bf16 where the device has it, fp16 on other GPUs, "
        "float32 elsewhere; tf32: float32 with the short mantissa of a GPU's tensor cores",
    )
    deterministic: bool = Field(
        default=False,
        description="take only algorithms that repeat to the bit on the same GPUs, or stop",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="where to compute; auto: a GPU where there is one"
    )
    compile: Literal["auto"] | bool = Field(
        default=False,
        description="compile the step, and a CUDA graph of it; auto: on a GPU, by the run's length",
    )
    output: PathText = Field(description="folder of the run; relative to the working folder")
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="go on with the run in train.output, or refuse to where there is one",
    )
    max_steps: Count | None = Field(
        default=None, description="steps after which the run ends early"
    )
    keep_checkpoints: Count = Field(
        default=2, description="newest checkpoints kept, beside the best one"
    )
    checkpoint_every: Count | None = Field(
        default=None,
        description="steps between checkpoints; the end of an epoch has one in any case",
    )
    checkpoint_minutes: Positive | None = Field(
        default=15.0,
        description="minutes since the last checkpoint until one is due; null: by steps alone",
    )
    checkpoint_errors: Literal["continue", "stop"] = Field(
        default="continue", description="what a checkpoint that cannot be written does to the run"
    )
    max_skipped_steps: Amount = Field(
        default=0,
        description="steps of a run that may be skipped, as they are not finite; one more ends it",
    )
    log_every: Count = Field(default=20, description="steps between log lines")
    profile: Count | None = Field(
        default=None,
        description="steps of which every node keeps a trace of torch's profiler, for Perfetto",
    )
    timeout_s: float = Field(
        default=60.0,
        ge=1,
        le=604_800,
        description="seconds without a step after which the job ends and names the rank",
    )


class EngineChoice(Section):
    """Who does the data-parallel work."""

    name: Literal["ddp", "deepspeed"] = Field(
        default="ddp", description="torch's DDP, or DeepSpeed"
    )
    zero_stage: int = Field(
        default=1,
        ge=0,
        le=3,
        description="deepspeed: what is divided over the ranks: 0 nothing, 1 the "
        "optimiser's state, 2 gradients too, 3 weights too",
    )
    deepspeed: dict[str, Any] = Field(
        default={}, description="deepspeed: its own configuration, laid over the derived one"
    )


def _experiment() -> str:
    number = os.environ.get("MLFLOW_EXPERIMENT_ID")
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or (f"id:{number}" if number else "dan_dist")


def _samples_system() -> bool:
    return os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in ("true", "1")


class Tracking(Section):
    """The record in MLflow; MLFLOW_TRACKING_URI names a server."""

    enabled: bool = Field(default=True, description="whether the run is recorded")
    experiment: str = Field(
        default_factory=_experiment,
        json_schema_extra={"default": "dan_dist"},
        description="MLflow's experiment by its name, or by its number as id:NUMBER; "
        "MLFLOW_EXPERIMENT_NAME, else MLFLOW_EXPERIMENT_ID, is another default",
    )
    run_name: str | None = Field(
        default=None, description="the run's name; null: that of the folder train.output"
    )
    parent: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = Field(
        default=None,
        description="name of a run that holds this one and others, made where there is none",
    )
    tags: dict[str, str] = Field(
        default={}, description="tags of the run, beside those of data, device and commit"
    )
    system_metrics: bool = Field(
        default_factory=_samples_system,
        json_schema_extra={"default": False},
        description="every node's CPU, memory, disk, network and GPUs, sampled every 10 s; "
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=true is another default",
    )


class Config(Section):
    """A whole configuration."""

    task: Literal["expression", "identity"] = Field(
        default="expression",
        description="what is learned: expressions, or a backbone from identities",
    )
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
        if self.data.decoded == "host" and self.data.cache is None:
            raise ValueError("data.decoded: host takes a folder on each node, set data.cache")
        if self.model.backbone == "imagenet" and self.model.width != 64:
            raise ValueError("model.width: imagenet's weights have 64")
        if self.model.weights_classes and not self.model.weights:
            raise ValueError("model.weights_classes: only model.weights takes it")
        if self.task == "identity":
            self._only_a_backbone()
            if self.loss.classification == "soft":
                raise ValueError("loss.classification: only task=expression takes soft")
        elif self.loss.classification == "arcface":
            raise ValueError("loss.classification: only task=identity takes arcface")
        elif self.data.pairs_file:
            raise ValueError("data.pairs_file: only task=identity takes it")
        if self.engine.name == "deepspeed" and self.train.precision in ("float64", "fp16"):
            raise ValueError(f"train.precision: {self.train.precision} needs engine.name=ddp")
        if self.optim.nesterov and (self.optim.name != "sgd" or not self.optim.momentum):
            raise ValueError("optim.nesterov: only optim.name=sgd with a momentum takes it")
        self._check_schedule()
        return self

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if schedule.name != "step" and schedule.every != 1:
            raise ValueError("schedule.every: only schedule.name=step takes it")
        if schedule.name == "cosine" and schedule.gamma != 1.0:
            raise ValueError("schedule.gamma: schedule.name=cosine does not take it")
        if schedule.name != "cosine" and schedule.floor:
            raise ValueError("schedule.floor: only schedule.name=cosine takes it")
        if schedule.warmup_steps and schedule.warmup_epochs:
            raise ValueError("schedule.warmup_epochs: schedule.warmup_steps is given already")

    def _only_a_backbone(self) -> None:
        """Identities train a ResNet-18 and its classifier: what DAN adds has no place there."""
        for key, value, wanted in (
            ("data.holdout", self.data.holdout, None),
            ("data.fold", self.data.fold, None),
            ("data.test_split", self.data.test_split, None),
            ("train.select", self.train.select, "accuracy"),
            ("model.heads", self.model.heads, 0),
            ("model.weights", self.model.weights, None),
            ("loss.fcn", self.loss.fcn, "none"),
            ("loss.afn", self.loss.afn, "none"),
        ):
            if value != wanted:
                text = "null" if wanted is None else wanted
                raise ValueError(f"task identity trains a backbone: {key} must be {text}")
