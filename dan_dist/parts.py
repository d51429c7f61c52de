"""What a configuration says, made: shards, objective, engine, streams, tracker."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dan_dist import checkpoint
from dan_dist.augment import Augment
from dan_dist.cache import is_remote
from dan_dist.config import Config, flatten
from dan_dist.data import Stream, evaluation_stream, train_stream
from dan_dist.engine import Engine, check_split, resolve_precision
from dan_dist.losses import Margin, Objective
from dan_dist.model import DAN
from dan_dist.shardset import ShardSet, Split, open_shardset
from dan_dist.task import Task, expressions, identities
from dan_dist.tracking import MlflowTracker, NullTracker
from dan_dist.weights import listed, load_backbone, load_weights
from dan_dist.world import World
from shards import synthetic

log = logging.getLogger(__name__)


def make_synthetic(config: Config) -> None:
    """Packs the drawn faces of the configuration where they are not yet."""
    faces = config.data.synthetic
    if faces is None:
        return
    if is_remote(config.data.shards):
        raise ValueError(f"data.synthetic: faces cannot be packed into {config.data.shards}")
    if faces.by == "identity":
        wanted = synthetic.identity_release(
            faces.train, faces.val, identities=faces.identities, held_out=faces.held_out,
            size=faces.size, seed=faces.seed,
        )  # fmt: skip
    else:
        wanted = synthetic.release(faces.train, faces.val, size=faces.size, seed=faces.seed)
    synthetic.ensure(config.data.shards, wanted, size=faces.size)


def open_data(config: Config, world: World, folder: str) -> tuple[ShardSet, Split, Task]:
    """The shards in `folder`, what trains and the task, checked against configuration and world.

    Raises:
        FileNotFoundError, ValueError: whatever would stop or spoil the training later.
    """
    shards = open_shardset(folder)
    expected = config.data.classes
    if expected is not None and tuple(expected) != shards.class_names:
        raise ValueError(
            f"data.classes has {len(expected)} classes ({listed(expected)}), {shards.root} has "
            f"{len(shards.class_names)} ({listed(shards.class_names)})"
        )
    if len(shards.class_names) < 2:
        raise ValueError(f"{shards.root}: {len(shards.class_names)} class, at least 2 are needed")
    train, data = shards.split("train"), config.data
    global_batch = config.train.global_batch
    if len(train) < global_batch:
        raise ValueError(
            f"{shards.root}: {len(train)} training images, fewer than train.global_batch "
            f"({global_batch})"
        )
    if config.task == "identity":
        task = identities(
            shards, train, data.val_split, pairs=data.pairs, pairs_file=data.pairs_file
        )
    else:
        task = expressions(shards, train, data.val_split)
    check_split(global_batch, config.train.micro_batch, world.size, config.model.sync_bn)
    checkpoint.check_writable(Path(config.train.output))
    return shards, train, task


def build_objective(config: Config, class_names: tuple[str, ...], *, is_new: bool) -> Objective:
    """Network and losses at their start: 1. the seed, 2. a file of weights, later a checkpoint.

    is_new: there is no checkpoint to come, which would make the file of weights pointless.
    """
    torch.manual_seed(config.train.seed)
    classes, margin = len(class_names), None
    if config.loss.classification == "arcface":
        margin = Margin(config.loss.arcface_s, config.loss.arcface_m)
    network = DAN(classes, config.model.heads, cosine=margin is not None)
    if is_new and (source := config.model.weights) is not None:
        order = config.model.weights_classes
        log.info(load_weights(network, class_names, source, order))
    elif is_new:
        log.info(load_backbone(network, config.model.backbone))
    return Objective(
        network,
        classes,
        fcn=config.loss.fcn,
        afn=config.loss.afn,
        lambda_fcn=config.loss.lambda_affinity,
        lambda_afn=config.loss.lambda_partition,
        margin=margin,
    )


def build_engine(config: Config, world: World, objective: Objective) -> Engine:
    """The objective on this rank's device, with its optimiser, under DDP or DeepSpeed."""
    make: Callable[..., Engine] = Engine
    if config.engine.name == "deepspeed":
        from dan_dist.deepspeed_engine import DeepSpeedEngine  # takes seconds to import

        extra = config.engine.deepspeed
        make = partial(DeepSpeedEngine, zero_stage=config.engine.zero_stage, extra=extra)
    return make(
        objective,
        world,
        optimizer=config.optim.name,
        lr=config.optim.lr,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        precision=resolve_precision(config.train.precision, world.device),
        sync_bn=config.model.sync_bn,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        compile=config.train.compile,
        may_skip=config.train.max_skipped_steps > 0,
        clip_norm=config.optim.clip_norm,
    )


def open_train_stream(
    config: Config, world: World, shards: ShardSet, train: Split, *, start: int
) -> Stream:
    """The augmented batches of this rank from step `start` on."""
    augment = config.data.augment.model_dump()
    for name in ("scale", "erase_area"):
        augment[name] = tuple(augment[name])
    return train_stream(
        train,
        rank=world.rank,
        world_size=world.size,
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        balanced=config.data.sampling == "balanced",
        augment=Augment(**augment),
        max_bad=config.data.max_bad_images,
        tally=partial(world.tally, "damaged") if world.store else None,
        start=start,
        image_size=config.model.image_size,
        shard_image_size=shards.image_size,
        device=world.device,
        threads=config.data.threads or world.cores,
    )


def open_val_stream(
    config: Config, world: World, shards: ShardSet, val: Split
) -> tuple[Stream, int]:
    """This rank's part of the validation passes, and the steps of one pass."""
    return evaluation_stream(
        val,
        rank=world.rank,
        world_size=world.size,
        image_size=config.model.image_size,
        shard_image_size=shards.image_size,
        device=world.device,
        threads=config.data.threads or world.cores,
    )


def open_tracker(
    config: Config, world: World, shards: ShardSet, state: dict[str, Any]
) -> NullTracker:
    """MLflow on rank 0; elsewhere, and where it is switched off, a tracker that records nothing."""
    if not world.is_main or not config.tracking.enabled:
        return NullTracker()
    folder = Path(config.train.output)
    return MlflowTracker(
        folder,
        run_id=state["run_id"],
        # After damage, what was noted of later steps does not stand
        forget_after=None if checkpoint.damaged_since(folder) is None else state["step"],
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name or Path(config.train.output).name,
        parent=config.tracking.parent,
        params=flatten(config.model_dump()),
        config=config.model_dump(),
        tags={
            **config.tracking.tags,
            "dataset": shards.dataset,
            "release": shards.release,
            "fingerprint": shards.fingerprint,
            "world_size": str(world.size),
            "device": world.device.type,
            "precision": resolve_precision(config.train.precision, world.device),
        },
    )
