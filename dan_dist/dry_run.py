"""Every check of a training that needs no training: nothing is computed, nothing stays behind."""

import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision

from dan_dist.build import (
    TrainingData,
    assemble_data,
    drawn_release,
    initial_objective,
    join_sets,
    make_synthetic,
)
from dan_dist.config import Config, Synthetic
from dan_dist.data.cache import find_copy, is_remote, localise, read_manifest
from dan_dist.distributed.device import choose_device
from dan_dist.distributed.world import World
from dan_dist.header import log_data, log_place
from dan_dist.record import known_run
from dan_dist.redaction import redact
from dan_dist.room import check_room
from dan_dist.run.folder import (
    check_writable,
    checkpoint_to_resume,
    locked_run_folder,
    no_new_folders,
)
from dan_dist.run.plan import make_plan
from dan_dist.run.state import TrainState
from dan_dist.tracking.faults import ClosedError, reason_of
from dan_dist.tracking.names import check_written
from dan_dist.tracking.read_only import check_file
from dan_dist.tracking.sqlite import database
from dan_dist.tracking.store import check_new, check_takes, connect, is_new, store
from dan_dist.tracking.system_metrics import interval_s
from dan_dist.train import read_checkpoint
from shards.format import (
    MANIFEST,
    ShardSet,
    Split,
    open_shardset,
    parse_manifest,
)
from shards.index import INDEX_DTYPE, with_soft

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outline(ShardSet):
    """A set whose images are not here: its splits have labels alone."""

    is_soft: bool  # whether they are soft, as a training wants them, which the copy may not have

    def split(self, name: str) -> Split:
        if name not in self.counts:
            raise ValueError(f"{self.root}: no split '{name}', it has {', '.join(self.splits)}")
        counts = self.counts[name]
        index = np.zeros(sum(counts), INDEX_DTYPE)
        index["label"] = np.repeat(np.arange(len(counts)), counts)
        index["crc32"] = np.arange(len(index))  # different images
        if self.is_soft:
            index = with_soft(index, np.eye(len(counts), dtype=np.float32)[index["label"]])
        return Split(name, self.root, (), index, self.class_names, self.image_size)


def check(config: Config, ranks: int, *, is_here: bool = True) -> None:
    """Logs what each check of a training on so many ranks has found.

    is_here: it would run on this machine. Else, where this one has no GPU and train.device lets the
    ranks choose, nothing is known of the memory and the nodes that they will have.

    Raises:
        ValueError, OSError: as the training would.
    """
    folder = Path(config.train.output)
    device = choose_device(config.train.device, 0, 1)
    is_here = is_here or device.type == "cuda" or config.train.device != "auto"
    gpus = torch.cuda.device_count() if device.type == "cuda" else ranks
    world = World(0, 0, ranks, min(ranks, gpus), device)
    log_place(config, world, is_here=is_here)
    shards = find_shards(config)
    with no_new_folders(folder), locked_run_folder(folder):
        data = assemble_data(without_pairs_file(config, shards), world, shards)
        log_data(config, world, shards, data.train, data.task.images)
        check_room(config, world, data.task.classes, is_here=is_here)
        saved = check_start(config, data)
    if config.engine.name == "deepspeed":
        from dan_dist.engine.deepspeed import check_extra  # takes seconds to import

        check_extra(config.engine.deepspeed)
    if config.tracking.enabled:
        tracking = config.tracking
        check_written(tracking.experiment, tracking.tags, tracking.run_name)
        check_store(store()[0], tracking.experiment, known_run(config, saved))
        if tracking.system_metrics:
            interval_s()
    log.info("all checks passed; the configuration:")


def find_shards(config: Config) -> ShardSet:
    """The set that is trained on, or its outline where the training draws or copies it first."""
    faces = config.data.synthetic
    found = [_find(config, path, faces if k == 0 else None)
             for k, path in enumerate(config.data.paths)]  # fmt: skip
    return join_sets(config, found)


def _find(config: Config, source: str, faces: Synthetic | None) -> ShardSet:
    """One set; faces: that are drawn for it."""
    cache, is_soft = config.data.cache, config.loss.classification == "soft"
    if faces is not None and not (Path(source) / MANIFEST).exists():
        drawn = drawn_release(faces, source)
        with no_new_folders(Path(source)):
            check_writable(Path(source), "data.shards")
        labels = {name: Counter(i.label for i in items) for name, items in drawn.splits.items()}
        classes = range(len(drawn.class_names))
        counts = {name: tuple(found[k] for k in classes) for name, found in labels.items()}
        log.info("data.shards %s: not there yet; the training draws the faces", source)
        return Outline(
            Path(source), drawn.dataset, drawn.release, drawn.class_names, faces.size, "", counts,
            dict.fromkeys(counts, ()), {}, {}, {}, drawn.face_cut, is_soft,
        )  # fmt: skip
    if faces is not None:
        make_synthetic(config)  # they are there: compares them
    if cache is None:
        return open_shardset(localise(source, None))
    content = read_manifest(source)
    if (copied := find_copy(cache, content)) is not None:
        return open_shardset(copied)
    found = parse_manifest(Path(source), content)
    with no_new_folders(Path(cache)):
        check_writable(Path(cache), "data.cache")
        free = shutil.disk_usage(cache).free
    needed = sum(shard.size_bytes for own in found.shards.values() for shard in own)
    if needed > free:
        raise OSError(
            f"data.cache {cache}: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free"
        )
    log.info("data.cache %s: the training copies %.1f MB into it", cache, needed / 1e6)
    return Outline(**vars(found), is_soft=is_soft) if is_remote(source) else open_shardset(source)


def without_pairs_file(config: Config, shards: ShardSet) -> Config:
    """A file of pairs names images, of which an outline has none: it is looked for, not read."""
    path = config.data.pairs_file
    if path is None or not isinstance(shards, Outline):
        return config
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.pairs_file {path}: no such file")
    return config.model_copy(update={"data": config.data.model_copy(update={"pairs_file": None})})


def check_start(config: Config, data: TrainingData) -> str | None:
    """What the weights start from: a checkpoint that the run resumes from, or a file of weights.

    Returns the run in MLflow that the checkpoint names.
    """
    path = checkpoint_to_resume(Path(config.train.output), config.train.resume)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    is_wanted = not path and not config.model.weights and config.model.backbone == "imagenet"
    is_missing = is_wanted and not file.is_file()
    if is_missing:
        log.info("backbone: imagenet; the training downloads it to %s", file)
    objective = initial_objective(config, data.class_names, is_new=not path and not is_missing)
    if not path:
        log.info("no checkpoint in %s: a new run", config.train.output)
        return None
    if not data.shards.fingerprint:
        log.info("%s: whether it is of these faces is known once they are drawn", path)
        return None
    content = read_checkpoint(path, config, data)
    make_plan(config, images=len(data.train), start=content["step"])
    objective.load_state_dict(content["objective"])
    log.info("%s: the run resumes after step %d", path, content["step"])
    return TrainState.from_checkpoint(content).run_id


def check_store(uri: str, experiment: str, run_id: str | None) -> None:
    """Whether MLflow's store can be used now; a training goes on without, and sends it all later.

    A server is asked; a file is read, and neither made nor changed. run_id: of a run that is to be
    there.

    Raises:
        ValueError: MLflow will not take the run, now or later.
    """
    try:
        file = database(uri)
        if file is None:
            check_takes(connect(uri), experiment, run_id)
            state = "reachable"
        elif not is_new(uri):
            state = check_file(file, uri, experiment, run_id)
        else:
            check_new(uri, experiment, run_id)
            with no_new_folders(file.parent):
                check_writable(file.parent, "its folder")
            state = f"the training makes {file}"
    except ClosedError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # mlflow's errors share no base but Exception
        line = f"MLflow at {uri} is not reachable: {reason_of(error)}"
        log.warning("%s; a training keeps a journal", redact(line))
    else:
        log.info("MLflow: %s", state)
