"""The story of a training run: shards, network, resume, loop, evaluation, checkpoints."""

import logging
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dan_dist import checkpoint
from dan_dist.augment import Augment
from dan_dist.config import REPOSITORY, Config, Schedule, flatten
from dan_dist.data import MEAN, STD, Batch, Stream, evaluation_stream, train_stream
from dan_dist.engine import Engine, Precision
from dan_dist.losses import Objective
from dan_dist.metrics import summarise
from dan_dist.model import DAN, load_backbone
from dan_dist.sampler import steps_per_epoch
from dan_dist.shardset import MANIFEST, ShardSet, Split, open_shardset
from dan_dist.tracking import MlflowTracker, NullTracker, confusion_figure, images_figure
from dan_dist.world import World, close_world, core_count, init_world
from shards import synthetic
from shards.writer import pack

log = logging.getLogger(__name__)

PARTS = ("loss", "loss_classification", "loss_fcn", "loss_afn")


def main(config: Config) -> dict[str, float]:
    """Trains as `config` says, on as many ranks as torchrun started; returns the last metrics.

    Raises:
        ValueError, OSError: bad input, one line each, before training starts.
        FloatingPointError: the loss is not finite; names the step.
    """
    world = init_world(config.train.device, timeout_s=config.train.timeout_s)
    try:
        return run(config, world)
    finally:
        close_world(world)


def run(config: Config, world: World) -> dict[str, float]:
    """One training run in a world that is already there."""
    if config.data.synthetic:
        world.main_only("shards", lambda: make_synthetic(config))
    shards, train, val = world.together(lambda: open_data(config, world))
    engine = world.together(lambda: build_engine(config, world, shards))
    steps = steps_per_epoch(len(train), config.train.global_batch)
    total = min(steps * config.train.epochs, config.train.max_steps or steps * config.train.epochs)
    saved = world.together(lambda: resume(config, world, engine, shards))
    tracker = open_tracker(config, world, shards, saved.get("run_id"))
    streams: list[Stream] = []
    status = "FAILED"
    try:
        train_batches, val_batches, val_steps = open_streams(
            config, world, shards, train, val, saved["step"]
        )
        streams += [train_batches, val_batches]
        progress = Progress(config, world, tracker, train_batches, saved["step"], total)
        best, metrics = saved["best"], saved["metrics"]
        for step in range(saved["step"], total):
            epoch = step // steps
            batch = next(train_batches)
            if step == 0:
                show_images(tracker, batch, shards)
            losses = engine.train_step(
                batch,
                global_batch=config.train.global_batch,
                micro_batch=config.train.micro_batch,
                lr=learning_rate(config.optim.lr, config.schedule, epoch),
            )
            progress.step(step, epoch, losses)
            done = step + 1
            at_end = done % steps == 0 or done == total
            if at_end:
                progress.flush()
                engine.average_buffers()
                matrix = engine.evaluate(val_batches, val_steps, len(shards.class_names))
                metrics = summarise(matrix, shards.class_names)
                is_best = metrics["accuracy"] > best.get("accuracy", -1.0)
                if is_best:
                    best = {**metrics, "epoch": epoch + 1, "step": done}
                progress.evaluated(done, epoch, metrics, best, matrix, shards.class_names)
            if at_end or done % (config.train.checkpoint_every or total) == 0:
                progress.flush()
                state = describe(config, shards, tracker, done, best, metrics)
                save(config, world, engine, state, best=at_end and is_best)
                progress.restart_clock()
        progress.close()
        report(config, world, tracker, shards, total, metrics, best)
        status = "FINISHED"
        return metrics
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.end(status)
        for stream in streams:
            stream.close()


def make_synthetic(config: Config) -> None:
    """Packs the drawn faces into `data.shards` where they are not yet."""
    faces = config.data.synthetic
    assert faces is not None
    release = synthetic.release(faces.train, faces.val, size=faces.size, seed=faces.seed)
    folder = Path(config.data.shards)
    if not (folder / MANIFEST).exists():
        log.info("drawing %d faces into %s", faces.train + faces.val, folder)
        pack(release, folder, size=faces.size)
        synthetic.contact_sheet(folder / "contact_sheet.png", size=faces.size, seed=faces.seed)
    found = open_shardset(folder)
    counts = {name: len(items) for name, items in release.splits.items()}
    if (found.dataset, found.release) != (release.dataset, release.release) or counts != {
        name: sum(per_class) for name, per_class in found.counts.items()
    }:
        raise ValueError(
            f"data.shards {folder} holds {found.dataset} ({found.release}, {found.counts}), not the "
            f"faces of data.synthetic ({release.release}, {counts}); name another folder"
        )


def open_data(config: Config, world: World) -> tuple[ShardSet, Split, Split]:
    """The shards and their two splits, checked against the configuration and the world.

    Raises:
        FileNotFoundError, ValueError: whatever would stop or spoil the training later.
    """
    shards = open_shardset(config.data.shards)
    expected = config.data.classes
    if expected is not None and tuple(expected) != shards.class_names:
        raise ValueError(
            f"data.classes has {len(expected)} classes ({', '.join(expected)}), {shards.root} has "
            f"{len(shards.class_names)} ({', '.join(shards.class_names)})"
        )
    if len(shards.class_names) < 2:
        raise ValueError(f"{shards.root}: {len(shards.class_names)} class, at least 2 are needed")
    train, val = shards.split("train"), shards.split(config.data.val_split)
    global_batch = config.train.global_batch
    if len(train) < global_batch:
        raise ValueError(
            f"{shards.root}: {len(train)} training images, fewer than train.global_batch "
            f"({global_batch})"
        )
    if not len(val):
        raise ValueError(f"{shards.root}: split '{config.data.val_split}' is empty")
    if world.size > global_batch:
        raise ValueError(f"{world.size} ranks, more than train.global_batch ({global_batch})")
    check_micro_batches(config, world)
    check_writable(Path(config.train.output))
    return shards, train, val


def check_micro_batches(config: Config, world: World) -> None:
    """Every rank needs images in every micro-step, and BatchNorm at least two."""
    global_batch, micro_batch = config.train.global_batch, config.train.micro_batch
    largest = -(-global_batch // world.size)
    micro_steps = -(-largest // (micro_batch or largest))
    smallest = global_batch // world.size // micro_steps
    statistics = smallest * (world.size if config.model.sync_bn else 1)
    if smallest < 1 or statistics < 2:
        raise ValueError(
            f"train.global_batch {global_batch} over {world.size} ranks in {micro_steps} micro-steps "
            f"leaves BatchNorm {statistics} images, at least 2 are needed; raise train.micro_batch"
        )
    if micro_steps > 1 and world.is_main:
        log.info(
            "%d micro-steps a step: BatchNorm and the batch-mean partition loss see %d images each",
            micro_steps,
            -(-global_batch // micro_steps) if config.model.sync_bn else smallest,
        )


def check_writable(folder: Path) -> None:
    """Creates `folder` and a file in it.

    Raises:
        OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"train.output {folder} cannot be written: {error.strerror}") from error


def build_engine(config: Config, world: World, shards: ShardSet) -> Engine:
    """The objective with its start: 1. seed, 2. backbone file; a checkpoint comes after."""
    torch.manual_seed(config.train.seed)
    classes = len(shards.class_names)
    network = DAN(classes, config.model.heads)
    log.info(load_backbone(network, config.model.backbone))
    objective = Objective(
        network,
        classes,
        fcn=config.loss.fcn,
        afn=config.loss.afn,
        lambda_fcn=config.loss.lambda_affinity,
        lambda_afn=config.loss.lambda_partition,
    )
    return Engine(
        objective,
        world,
        optimizer=config.optim.name,
        lr=config.optim.lr,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        precision=resolve_precision(config, world),
        sync_bn=config.model.sync_bn,
        compile=config.train.compile,
    )


def resolve_precision(config: Config, world: World) -> Precision:
    """bf16 on a GPU and float32 on a CPU, unless the configuration says otherwise."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if world.device.type == "cuda" else "float32"


def learning_rate(base: float, schedule: Schedule, epoch: int) -> float:
    """The learning rate of an epoch (from 0): times gamma each epoch, or each `every` epochs."""
    return base * schedule.gamma ** (epoch // schedule.every)


def resume(config: Config, world: World, engine: Engine, shards: ShardSet) -> dict[str, Any]:
    """Puts the newest readable checkpoint of `train.output` into the engine; what it says of the run.

    Raises:
        ValueError: it is of another configuration or data set, or train.resume is never but
            checkpoints are there.
    """
    folder = Path(config.train.output)
    fresh: dict[str, Any] = {"step": 0, "best": {}, "metrics": {}, "run_id": None}
    paths = checkpoint.steps_saved(folder)
    if paths and config.train.resume == "never":
        raise ValueError(
            f"train.output {folder} holds {paths[0].name} of an earlier run; train.resume=auto "
            "goes on with it, another train.output starts anew"
        )
    for path in paths:
        try:
            content = checkpoint.load(path)
        except ValueError as error:
            log.warning("%s; trying the one before", error)
            continue
        checkpoint.check_continues(
            path, {**content, "config": flatten(content["config"])},
            flatten(config.model_dump()), shards.fingerprint,
        )  # fmt: skip
        engine.load_state(content)
        log.info("resumed after step %d from %s", content["step"], path)
        return {key: content[key] for key in fresh}
    return fresh


def open_streams(
    config: Config, world: World, shards: ShardSet, train: Split, val: Split, start: int
) -> tuple[Stream, Stream, int]:
    """The training stream from step `start`, the evaluation stream, and the steps of a pass."""
    augment = config.data.augment
    common: dict[str, Any] = {
        "rank": world.rank,
        "world_size": world.size,
        "image_size": config.model.image_size,
        "shard_image_size": shards.image_size,
        "device": world.device,
        "threads": config.data.threads or max(1, core_count() // world.local_size),
    }
    low, high = augment.scale
    train_batches = train_stream(
        train,
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        balanced=config.data.sampling == "balanced",
        augment=Augment(
            flip_p=augment.flip_p,
            affine_p=augment.affine_p,
            degrees=augment.degrees,
            scale=(low, high),
            translate=augment.translate,
            erase_p=augment.erase_p,
            erase_area=(augment.erase_area[0], augment.erase_area[1]),
        ),
        max_bad=config.data.max_bad_images,
        start=start,
        **common,
    )
    # As many images a rank as in training, so that evaluation never needs more memory.
    batch = max(world.size, config.train.global_batch)
    val_batches, val_steps = evaluation_stream(val, global_batch=batch, **common)
    return train_batches, val_batches, val_steps


def open_tracker(config: Config, world: World, shards: ShardSet, run_id: str | None) -> NullTracker:
    """MLflow on rank 0; elsewhere, and where it is switched off, a tracker that records nothing."""
    if not world.is_main or not config.tracking.enabled:
        return NullTracker()
    return MlflowTracker(
        experiment=config.tracking.experiment,
        run_name=config.tracking.run_name or Path(config.train.output).name,
        run_id=run_id,
        params=flatten(config.model_dump()),
        config=config.model_dump(),
        tags={
            "dataset": shards.dataset,
            "release": shards.release,
            "fingerprint": shards.fingerprint,
            "world_size": str(world.size),
            "device": str(world.device),
            "precision": resolve_precision(config, world),
            "commit": commit(),
        },
    )


def commit() -> str:
    """The repository's git commit, or "unknown" outside a checkout."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Progress:
    """What rank 0 tells while training: the bar, log lines, metrics; and the check for NaN."""

    def __init__(
        self,
        config: Config,
        world: World,
        tracker: NullTracker,
        stream: Stream,
        start: int,
        total: int,
    ) -> None:
        self.config, self.tracker, self.stream = config, tracker, stream
        self.bar = tqdm(
            total=total, initial=start, unit="step", disable=None if world.is_main else True
        )
        self.pending: tuple[int, Tensor] | None = None
        self.losses: list[Tensor] = []
        self.restart_clock()

    def step(self, step: int, epoch: int, losses: Tensor) -> None:
        """Notes one step's global losses, (4,) on the device; a log line every `log_every` steps.

        Raises:
            FloatingPointError: the previous step's loss was not finite. It is looked at one step
                late, when a GPU has finished it, so that the check never makes the GPU wait.
        """
        self._check()
        self.pending = step, losses
        self.losses.append(losses)
        self.bar.update()
        if (step + 1) % self.config.train.log_every == 0:
            self._log(step + 1, epoch)

    def flush(self) -> None:
        """Checks the last step too: before its weights are evaluated or saved."""
        self._check()
        self.pending = None

    def evaluated(
        self,
        step: int,
        epoch: int,
        metrics: dict[str, float],
        best: dict[str, float],
        matrix: Tensor,
        class_names: tuple[str, ...],
    ) -> None:
        """Logs an evaluation."""
        log.info(
            "epoch %d/%d evaluated: accuracy %.2f %%, mean recall %.2f %%",
            epoch + 1,
            self.config.train.epochs,
            100 * metrics["accuracy"],
            100 * metrics["mean_recall"],
        )
        values = {f"val/{name}": value for name, value in metrics.items()}
        self.tracker.metrics({**values, "val/best_accuracy": best["accuracy"]}, step)
        if best["step"] == step:
            counts = matrix.cpu().numpy()
            title = f"Validation, epoch {epoch + 1}: accuracy {100 * metrics['accuracy']:.2f} %"
            self.tracker.figure(
                lambda: confusion_figure(counts, class_names, title), "confusion_matrix.png"
            )

    def restart_clock(self) -> None:
        """Leaves evaluation and saving out of the throughput."""
        self.began, self.waited_s, self.counted = time.perf_counter(), self.stream.wait_s, 0
        self.losses.clear()

    def close(self) -> None:
        self.flush()
        self.bar.close()

    def _check(self) -> None:
        if self.pending is None:
            return
        step, losses = self.pending
        if not torch.isfinite(losses[0]):
            raise FloatingPointError(
                f"the loss is {losses[0].item()} at step {step + 1} "
                f"(parts: {dict(zip(PARTS[1:], losses[1:].tolist(), strict=True))}); training stops"
            )

    def _log(self, done: int, epoch: int) -> None:
        elapsed_s = time.perf_counter() - self.began
        means = torch.stack(self.losses).mean(dim=0).tolist()
        rate = len(self.losses) * self.config.train.global_batch / elapsed_s
        wait = (self.stream.wait_s - self.waited_s) / elapsed_s
        lr = learning_rate(self.config.optim.lr, self.config.schedule, epoch)
        log.info(
            "epoch %d/%d step %d loss %.4f (classification %.4f, fcn %.4f, afn %.4f) lr %.2g "
            "%.0f img/s, waiting for data %.1f %%",
            epoch + 1, self.config.train.epochs, done, *means, lr, rate, 100 * wait,
        )  # fmt: skip
        values = {f"train/{name}": value for name, value in zip(PARTS, means, strict=True)}
        speed = {"train/lr": lr, "train/images_per_s": rate, "train/wait_share": wait}
        self.tracker.metrics({**values, **speed, "train/epoch": done / self._steps()}, done)
        self.restart_clock()

    def _steps(self) -> float:
        return len(self.stream.reader.split) / self.config.train.global_batch


def show_images(tracker: NullTracker, batch: Batch, shards: ShardSet) -> None:
    """A sample of augmented training images, as the network sees them, to the tracker."""

    def draw() -> Any:
        pixels = batch.images.permute(0, 2, 3, 1).float().cpu().numpy()
        labels = batch.labels.cpu().numpy()
        return images_figure(
            pixels * np.float32(STD) + np.float32(MEAN),
            labels,
            shards.class_names,
            "Training images, augmented",
        )

    tracker.figure(draw, "training_images.png")


def describe(
    config: Config,
    shards: ShardSet,
    tracker: NullTracker,
    step: int,
    best: dict[str, float],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """What a checkpoint holds beside the engine's state."""
    return {
        "step": step,
        "best": best,
        "metrics": metrics,
        "run_id": tracker.run_id,
        "config": config.model_dump(),
        "class_names": list(shards.class_names),
        "fingerprint": shards.fingerprint,
    }


def save(config: Config, world: World, engine: Engine, state: dict[str, Any], best: bool) -> None:
    """Rank 0 writes the checkpoint, the best one apart and without the optimiser's state."""
    if not world.is_main:
        return
    folder = Path(config.train.output)
    content = {**state, **engine.state()}
    checkpoint.save(checkpoint.step_path(folder, state["step"]), content)
    checkpoint.prune(folder, config.train.keep_checkpoints)
    if best:
        weights = {k: v for k, v in content.items() if k != "optimizer"}
        checkpoint.save(folder / checkpoint.BEST, weights)


def report(
    config: Config,
    world: World,
    tracker: NullTracker,
    shards: ShardSet,
    total: int,
    metrics: dict[str, float],
    best: dict[str, float],
) -> None:
    """The last lines: what came out and where to look."""
    if not world.is_main:
        return
    folder = Path(config.train.output)
    tracker.artifact(folder / checkpoint.BEST, "checkpoints")
    log.info(
        "finished after %d steps: accuracy %.2f %% (best %.2f %% in epoch %d), mean recall %.2f %%, "
        "chance %.2f %%",
        total, 100 * metrics["accuracy"], 100 * best["accuracy"], best["epoch"],
        100 * metrics["mean_recall"], 100 / len(shards.class_names),
    )  # fmt: skip
    log.info("checkpoints: %s", folder)
    if tracker.where:
        log.info("look at the run: %s", tracker.where)
