"""The parts of a training, made from its configuration: data, engine, loaders, writer."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dan_dist.config import Augmentation, Config, Synthetic
from dan_dist.data.augment import Augment
from dan_dist.data.cache import is_remote, localise
from dan_dist.data.decoded import (
    DecodedReader,
    DeviceReader,
    decode_to_file,
    decode_to_memory,
    open_file,
)
from dan_dist.data.loader import Loader, check_soft_labels, evaluation_loader
from dan_dist.data.mixture import Part, describe_sets, join, set_of, shares_of
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader
from dan_dist.data.sampler import rank_columns
from dan_dist.distributed.world import World
from dan_dist.engine.compile import choose_compilation, describe
from dan_dist.engine.ddp import Engine, StepOptions
from dan_dist.engine.memory import name_memory_errors
from dan_dist.engine.passes import check_split
from dan_dist.engine.precision import resolve_precision
from dan_dist.evaluation.task import Task, open_tasks
from dan_dist.model.backbone import load_backbone
from dan_dist.model.classes import check_names, join_names
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Margin, Objective
from dan_dist.model.weights import load_weights
from dan_dist.redaction import redact, redact_tree
from dan_dist.run.folder import CheckpointWriter, check_writable
from shards import demo
from shards.format import ShardSet, Split, open_shardset
from shards.release import Release
from shards.releases import synthetic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The images that a run trains on, and the task that they are for."""

    shards: ShardSet
    train: Split
    task: Task
    test: Task | None = None  # on the images that are looked at once, after training

    @property
    def class_names(self) -> tuple[str, ...]:
        """The network's classes, in label order."""
        return self.shards.class_names[: self.task.classes]

    @property
    def splits(self) -> dict[str, Split]:
        """The images, by what they are used for."""
        found = {"train": self.train, "val": self.task.images}
        return found if self.test is None else {**found, "test": self.test.images}

    def describe(self, config: Config) -> dict[str, Any]:
        """What a checkpoint holds of its origin, as plain values."""
        return {
            "config": redact_tree(config.model_dump()),
            "class_names": list(self.class_names),
            "fingerprint": self.shards.fingerprint,
            "sets": describe_sets(self.shards),
            "face_cut": self.shards.face_cut,
        }


def open_data(config: Config, world: World) -> TrainingData:
    """The data of a run: drawn first where it is the demo's, copied where there is a cache.

    Raises:
        OSError, ValueError: whatever would stop or spoil the training later.
    """
    world.run_once(lambda: make_synthetic(config))
    cache, folders = config.data.cache, list[str]()
    for path in config.data.paths:
        folders.append(world.run_once(partial(localise, path, cache), per_node=True))
    data = world.run_on_all(
        lambda: assemble_data(config, world, join_sets(config, [*map(open_shardset, folders)]))
    )
    world.check_equal(f"{data.shards.root}: the images' fingerprint", data.shards.fingerprint)
    return data


def join_sets(config: Config, found: Sequence[ShardSet]) -> ShardSet:
    """The one set of a training, or several joined, as `data.shards` describes them.

    Raises:
        ValueError: classes do not meet, or several sets are for a task that takes one.
    """
    if isinstance(config.data.shards, str):
        return found[0]
    if config.task == "identity":
        raise ValueError("data.shards: task=identity takes one set, as a path")
    described = zip(found, config.data.shards, strict=True)
    parts = [Part(own, d.get("share", 1), d.get("classes", {})) for own, d in described]
    return join(parts, config.data.classes)


def make_synthetic(config: Config) -> None:
    """Packs the drawn faces of the configuration where they are not yet."""
    if (faces := config.data.synthetic) is not None:
        path = config.data.paths[0]
        demo.ensure(path, drawn_release(faces, path), size=faces.size)


def drawn_release(faces: Synthetic, shards: str) -> Release:
    """The faces that are to be drawn for the folder `shards`."""
    if is_remote(shards):
        raise ValueError(f"data.synthetic: faces cannot be packed into {redact(shards)}")
    return synthetic.release_by(
        faces.by, faces.train, faces.val, identities=faces.identities, held_out=faces.held_out,
        size=faces.size, seed=faces.seed,
    )  # fmt: skip


def assemble_data(config: Config, world: World, shards: ShardSet) -> TrainingData:
    """The images of each use and the task, checked against the configuration and the ranks.

    Raises:
        ValueError: classes, splits or the global batch do not fit.
        OSError: a split is not there, or `train.output` cannot be written.
    """
    check_names(list(shards.class_names), str(shards.root))
    expected = config.data.classes
    if expected is not None and tuple(expected) != shards.class_names:
        raise ValueError(
            f"data.classes has {len(expected)} classes ({join_names(expected)}), {shards.root} has "
            f"{len(shards.class_names)} ({join_names(shards.class_names)})"
        )
    if len(shards.class_names) < 2:
        raise ValueError(f"{shards.root}: {len(shards.class_names)} class, at least 2 are needed")
    is_identity, global_batch = config.task == "identity", config.train.global_batch
    train, task, test = open_tasks(shards, config.data, config.train.seed, is_identity=is_identity)
    if config.loss.classification == "soft":
        check_soft_labels(train, shards.root)
    if len(train) < global_batch:
        raise ValueError(
            f"{shards.root}: {len(train)} training images, fewer than train.global_batch "
            f"({global_batch})"
        )
    check_split(global_batch, config.train.micro_batch, world.size, config.model.sync_bn)
    check_writable(Path(config.train.output))
    return TrainingData(shards, train, task, test)


def initial_objective(config: Config, class_names: tuple[str, ...], *, is_new: bool) -> Objective:
    """Network and losses as a run starts: random from the seed, then a file of weights.

    is_new: no checkpoint is loaded afterwards, which would make the file of weights pointless.
    """
    torch.manual_seed(config.train.seed)
    objective = random_objective(config, len(class_names))
    network = objective.network
    if is_new and (source := config.model.weights) is not None:
        log.info(load_weights(network, class_names, source, config.model.weights_classes))
    elif is_new:
        log.info(load_backbone(network, config.model.backbone))
    return objective


def random_objective(config: Config, classes: int) -> Objective:
    """Network and losses whose weights torch's generator draws."""
    model, loss = config.model, config.loss
    is_cosine = loss.classification == "arcface"
    return Objective(
        DAN(classes, model.heads, width=model.width, cosine=is_cosine, fusion=model.fusion),
        classes,
        fcn=loss.fcn,
        afn=loss.afn,
        lambda_fcn=loss.lambda_fcn,
        lambda_afn=loss.lambda_afn,
        margin=Margin(loss.arcface_s, loss.arcface_m) if is_cosine else None,
        label_smoothing=loss.label_smoothing,
    )


def build_engine(config: Config, world: World, objective: Objective, *, steps: int = 0) -> Engine:
    """The objective on this rank's device, with its optimiser, under DDP or DeepSpeed.

    steps: of the run, for which compiling may pay.

    Raises:
        ValueError: the device's memory does not suffice, or DeepSpeed refuses its configuration.
    """
    chosen = choose_compilation(
        config.train.compile, world.device, steps=steps, prevented=prevented_capture(config, world)
    )
    if chosen.compile or chosen.capture or config.train.compile == "auto":
        log.info(describe(chosen))
    options = StepOptions(
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        precision=resolve_precision(config.train.precision, world.device, config.engine.name),
        sync_bn=config.model.sync_bn,
        compile=chosen.compile,
        capture=chosen.capture,
        may_skip=config.train.max_skipped_steps > 0,
        soft=config.loss.classification == "soft",
        deterministic=config.train.deterministic,
    )
    with name_memory_errors(world.device, "the network and its optimiser"):
        if config.engine.name == "deepspeed":
            from dan_dist.engine.deepspeed import DeepSpeedEngine  # takes seconds to import

            return DeepSpeedEngine(objective, world, config.optim, options, config.engine)
        return Engine(objective, world, config.optim, options)


def prevented_capture(config: Config, world: World) -> str:
    """Why a step does not become a CUDA graph, whatever the device; empty where it may."""
    if config.engine.name == "deepspeed":
        return "not under engine.name=deepspeed"
    if config.train.max_skipped_steps > 0:
        return "train.max_skipped_steps waits for each step's loss"
    if world.size > 1 and config.train.compile is not True:  # nccl within it if asked for
        return f"with {world.size} ranks by train.compile=true alone"
    return ""


def open_train_loader(config: Config, world: World, split: Split, *, start: int) -> Loader:
    """The augmented batches of this rank, of the steps after `start`."""
    train = config.train
    order = TrainOrder(
        split,
        rank_columns(train.global_batch, world.rank, world.size),
        global_batch=train.global_batch,
        seed=train.seed,
        balanced=config.data.sampling != "shuffle",
        shares=shares_of(split, config.data.sampling),
    )
    return Loader(
        open_reader(config, world, split),
        order,
        image_size=config.model.image_size,
        augment=make_augment(config.data.augment),
        device=world.device,
        threads=config.data.threads or world.cores,
        start=start,
        soft=config.loss.classification == "soft",
    )


def open_reader(config: Config, world: World, split: Split) -> Reader:
    """Reads the training images, or has them decoded before, on each device or once a node.

    Raises:
        ValueError, OSError: there is no room for them.
    """
    data, image_size = config.data, config.model.image_size

    def count_in_set(sample: int) -> int:
        return world.count_unique(f"damaged-{set_of(split, sample)}", sample)

    count_unique = count_in_set if world.store else None
    if data.decoded == "none":
        return Reader(split, data.max_bad_images, count_unique)
    threads = data.threads or world.cores
    if data.decoded == "host":
        path = world.run_once(
            lambda: decode_to_file(
                split, fingerprint=hashlib.sha256(split.index.tobytes()).hexdigest(),
                cache=data.cache, image_size=image_size, device=world.device,
                threads=threads * world.local_size,
            ),
            per_node=True,
        )  # fmt: skip
        decoded = world.run_on_all(lambda: open_file(path, split, image_size=image_size))
    else:
        on_gpu = world.device.type == "cuda"
        decoded = world.run_on_all(
            lambda: decode_to_memory(
                split, image_size=image_size, device=world.device, threads=threads,
                copies=1 if on_gpu else world.local_size,
            )
        )  # fmt: skip
        if on_gpu:
            return DeviceReader(split, decoded, data.max_bad_images, count_unique)
    return DecodedReader(split, decoded, data.max_bad_images, count_unique)


def make_augment(options: Augmentation) -> Augment:
    """The augmentation that a configuration describes."""
    values: dict[str, Any] = options.model_dump()
    for name in ("scale", "erase_area"):
        values[name] = tuple(values[name])
    return Augment(**values)


def open_val_loader(config: Config, world: World, split: Split) -> Loader:
    """This rank's part of the validation passes."""
    return evaluation_loader(
        split,
        rank=world.rank,
        world_size=world.size,
        image_size=config.model.image_size,
        device=world.device,
        threads=config.data.threads or world.cores,
    )


def open_writer(config: Config, world: World) -> CheckpointWriter:
    """Writes the run's checkpoints on rank 0; elsewhere, nothing."""
    return CheckpointWriter(
        Path(config.train.output),
        keep=config.train.keep_checkpoints,
        stop_on_error=config.train.checkpoint_errors == "stop",
        is_active=world.is_main,
    )
