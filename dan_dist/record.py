"""What MLflow gets of a training: its run, made from the configuration, and its nodes' load."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from dan_dist import __version__
from dan_dist.config import Config, flatten
from dan_dist.data.splits import selected_on
from dan_dist.distributed.world import World
from dan_dist.engine.precision import resolve_precision
from dan_dist.model.dan import cost
from dan_dist.run.folder import damaged_since
from dan_dist.run.state import TrainState
from dan_dist.tracking.inputs import dataset_inputs
from dan_dist.tracking.journal_files import read_records, read_sent
from dan_dist.tracking.names import check_written
from dan_dist.tracking.system_metrics import SystemMetrics
from dan_dist.tracking.tracker import MlflowTracker, NullTracker, RunRecord
from shards.format import ShardSet, Split

OWN = ("tracking.", "train.output")  # keys that set where a run is, not what it computes


def open_tracker(
    config: Config, world: World, shards: ShardSet, splits: Mapping[str, Split], classes: int,
    state: TrainState,
) -> NullTracker:  # fmt: skip
    """MLflow on rank 0; elsewhere, and where it is switched off, a tracker that records nothing.

    splits: by MLflow's word for what they are used for. classes: of the network.

    Raises:
        ValueError, OSError: as `MlflowTracker`; or a text of the configuration that MLflow cuts.
    """
    if not world.is_main or not config.tracking.enabled:
        return NullTracker()
    tracking = config.tracking
    check_written(tracking.experiment, tracking.tags, tracking.run_name)
    folder = Path(config.train.output)
    is_cosine = config.loss.classification == "arcface"
    model = config.model
    return MlflowTracker(
        folder,
        RunRecord(
            experiment=tracking.experiment,
            name=tracking.run_name or folder.name,
            parent=tracking.parent,
            parent_title=tracking.tags.get("ablation"),
            adopted=adopted_run(config),
            step=state.step,
            # Names and tags, which MLflow shows as such, would bury what is compared
            params={k: v for k, v in flatten(config.model_dump()).items() if not k.startswith(OWN)},
            config=config.model_dump(),
            tags={
                **tracking.tags,
                "dataset": shards.dataset,
                "release": shards.release,
                "fingerprint": shards.fingerprint,
                "version": __version__,
                "world_size": str(world.size),
                "device": world.device.type,
                "precision": resolve_precision(
                    config.train.precision, world.device, config.engine.name
                ),
                "output": config.train.output,
                "selected_on": selected_on(config.data.model_dump()),
                **cost(classes, model.heads, model.image_size, width=model.width, cosine=is_cosine),
            },
            datasets=dataset_inputs(shards, splits, config.data.paths[0]),
        ),
        run_id=state.run_id,
        # After damage, what was recorded of later steps does not stand
        rollback_to=None if damaged_since(folder) is None else state.step,
    )


def adopted_run(config: Config) -> str | None:
    """The run that somebody else has made for this one; an ablation's runs are its own."""
    return None if config.tracking.parent else os.environ.get("MLFLOW_RUN_ID") or None


def known_run(config: Config, saved: str | None) -> str | None:
    """The run that the training goes on with in MLflow, or that was made for it; None: a new one.

    saved: in the checkpoint that is resumed from. It is looked for, and no error where it is gone.

    Raises:
        ValueError: the journal in the run's folder is damaged.
    """
    folder = Path(config.train.output)
    begun = next((r for r in read_records(folder) if r["kind"] == "run"), None)
    own = None if saved else adopted_run(config)
    return read_sent(folder).run_id or (begun.get("adopted") if begun else own)


def sample_system(
    config: Config, world: World, tracker: NullTracker
) -> AbstractContextManager[object]:
    """Samples what this node is loaded with, on one rank of it, where that is asked for."""
    if not (config.tracking.enabled and config.tracking.system_metrics and world.local_rank == 0):
        return nullcontext()
    return SystemMetrics(tracker, world)
