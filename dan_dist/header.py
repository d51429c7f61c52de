"""What a user asks first of a training: the first lines of its log."""

import logging

from dan_dist.config import Config
from dan_dist.data.splits import log_selection
from dan_dist.distributed.device import device_name
from dan_dist.distributed.world import World
from dan_dist.engine.passes import micro_steps
from dan_dist.engine.precision import resolve_precision
from dan_dist.redaction import redact
from dan_dist.run.plan import make_plan
from dan_dist.tracking.store import store
from shards.format import ShardSet, Split

log = logging.getLogger(__name__)


def log_place(config: Config, world: World, *, is_here: bool = True) -> None:
    """Logs on rank 0 where the training computes, and where it leaves what it finds.

    is_here: else on nodes of which nothing is known, as a dry run has it.
    """
    if not world.is_main:
        return
    ranks, precision = _count(world.size, "rank"), config.train.precision
    if is_here:
        nodes = _count(-(-world.size // world.local_size), "node")
        found = resolve_precision(precision, world.device)
        log.info("device: %s, %s on %s, %s", device_name(world.device), ranks, nodes, found)
    else:
        log.info(
            "device: no usable GPU here, each rank takes its own; %s, precision %s",
            ranks,
            precision,
        )
    tracking = f"MLflow, {redact(store()[0])}" if config.tracking.enabled else "off"
    log.info("output: %s; tracking: %s", config.train.output, tracking)


def log_data(config: Config, world: World, shards: ShardSet, train: Split, val: Split) -> None:
    """Logs on rank 0 what the training computes on, in which batches, and how long."""
    if not world.is_main:
        return
    ranks, batch = world.size, config.train.global_batch
    least, most = batch // ranks, -(-batch // ranks)
    share = f"{least} or {most}" if least < most else f"{least}"
    passes = micro_steps(batch, config.train.micro_batch, ranks)
    plan = make_plan(config, images=len(train), start=0)
    log.info(
        "data: %s (%s), %s images of %s classes, %s to evaluate on",
        shards.dataset, shards.release, f"{len(train):,}", f"{len(shards.class_names):,}",
        f"{len(val):,}",
    )  # fmt: skip
    log_selection(config.data, config.train.select, val)
    in_parts = f", in {passes} micro-steps" if passes > 1 else ""
    log.info("batch: %d images, %s on each rank%s", batch, share, in_parts)
    log.info("steps: %s an epoch, %s in all", f"{plan.steps_per_epoch:,}", f"{plan.total:,}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number > 1 else "")
