"""What a run is computed on, as MLflow's inputs: data sets by name and digest, and the model."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dan_dist.data.mixture import JoinedSet, bounds_of
from dan_dist.model.weights import Trained, Which
from dan_dist.tracking.faults import (
    PartlyRefusedError,
    PendingError,
    is_refusal,
    noted,
    send_entries,
)
from dan_dist.tracking.journal_files import JOURNAL_TAG, is_pending, read_id, read_sent
from dan_dist.tracking.names import fit_value
from shards.format import ShardSet, Split

DIGEST_LETTERS = 32  # of a fingerprint: MLflow takes 36 at most
NAME_LETTERS = 500
MOST_CLASSES = 100  # whose images are counted each
TRAINED_BY = "trained_by"  # the tag of the training's run


class DatasetInput(NamedTuple):
    """A split of a data set, for one purpose."""

    name: str  # <data set>/<split>: MLflow knows an input by its name and digest
    fingerprint: str
    context: str  # train, val or test
    source: str  # the shards' folder or URL
    release: str
    profile: dict[str, Any]  # counts
    digest: str = ""  # of the images, where they are not all of the split; else the fingerprint's

    @property
    def key(self) -> dict[str, str]:
        """The name and the digest by which MLflow knows it."""
        digest = (self.digest or self.fingerprint)[:DIGEST_LETTERS]
        return {"name": fit_value(self.name, NAME_LETTERS), "digest": digest}


class ModelInput(NamedTuple):
    """The model that a training logs of a checkpoint."""

    run_id: str | None  # MLflow's, of the training; None: it was not known yet
    step: int | None  # None: the model serves other weights of the checkpoint
    journal: str | None = None  # the id of the training's, which MLflow's run has as a tag
    folder: str = ""  # of the training


def dataset_inputs(
    shards: ShardSet, splits: Mapping[str, Split], source: str
) -> list[dict[str, Any]]:
    """{context: split} of a data set as plain values, for a journal; of several, each by itself."""
    if isinstance(shards, JoinedSet):
        return [
            own
            for k, part in enumerate(shards.parts)
            for own in dataset_inputs(
                part.shards,
                {context: _part_of(split, k, part.shards) for context, split in splits.items()},
                str(part.shards.root),
            )
        ]
    fingerprint = shards.fingerprint or "unknown"
    return [
        DatasetInput(
            f"{shards.dataset}/{split.name}", fingerprint, context, source, shards.release,
            _profile(split), _digest(shards, split),
        )._asdict()
        for context, split in splits.items()
    ]  # fmt: skip


def _part_of(split: Split, number: int, shards: ShardSet) -> Split:
    """The images that a joined split has of one of its sets."""
    own = split.index[bounds_of(split)[number]]
    if len(own) == _count(shards, split.name):
        return shards.split(split.name)  # with the set's own names of classes
    return Split(split.name, split.root, split.shards, own, split.class_names, split.image_size)


def _count(shards: ShardSet, split: str) -> int | None:
    """The images of a split as it was packed; None: no split of that name was."""
    return sum(shards.counts[split]) if split in shards.counts else None


def _digest(shards: ShardSet, split: Split) -> str:
    """A digest of a split's images where they are not all that the set has under its name."""
    if len(split) == _count(shards, split.name):
        return ""
    digest = hashlib.sha256(shards.fingerprint.encode())
    for column in ("size", "crc32"):  # the images themselves, wherever they lie
        digest.update(np.ascontiguousarray(split.index[column]).tobytes())
    return digest.hexdigest()


def _profile(split: Split) -> dict[str, Any]:
    counts = {
        name: int((split.index["label"] == k).sum())
        for k, name in enumerate(split.class_names[: MOST_CLASSES + 1])
    }
    profile: dict[str, Any] = {"num_rows": len(split), "classes": len(split.class_names)}
    return profile | ({"images": counts} if len(counts) <= MOST_CLASSES else {})


def log_inputs(client: Any, run_id: str, record: Mapping[str, Any], uri: str) -> None:
    """Links a run with its data sets, its model and that one's training; once, if called often.

    uri: the store's, without secrets.

    Raises:
        PartlyRefusedError: of some; the others are linked. PendingError: as `find_model`.
    """
    from mlflow.entities import Dataset, InputTag, LoggedModelInput
    from mlflow.entities import DatasetInput as Input

    datasets, refused = [], dict[str, str]()
    for values in record["datasets"]:
        own = DatasetInput(**values)
        kind, source = _source(own.source)
        tags = {"mlflow.data.context": own.context, "fingerprint": own.fingerprint,
                "release": own.release, "images": str(own.profile["num_rows"]),
                "source": own.source}  # fmt: skip
        dataset = Dataset(
            **own.key, source_type=kind, source=json.dumps(source), profile=json.dumps(own.profile)
        )
        labels = [InputTag(k, fit_value(v, NAME_LETTERS)) for k, v in tags.items()]
        datasets.append((own.name, Input(dataset, labels)))
    with noted(refused):
        send_entries("data set", datasets, lambda few: client.log_inputs(run_id, few))
    training, model = find_model(client, record.get("model"), uri)
    if training is not None:
        client.set_tag(run_id, TRAINED_BY, training)
    if model is not None:
        known = client.get_run(run_id).inputs
        if model not in [m.model_id for m in (known.model_inputs if known else [])]:
            links = [(model, LoggedModelInput(model))]
            with noted(refused):
                send_entries("model", links, lambda few: client.log_inputs(run_id, models=few))
    if refused:
        raise PartlyRefusedError(refused)


def model_of(trained: Trained, weights: Which = "auto") -> ModelInput | None:
    """The model that the training of a checkpoint logs of it, where it keeps a record for MLflow.

    A checkpoint that is older than MLflow's answer does not name its run: its folder does.

    weights: those that were taken. A model serves the average, where there is one.
    """
    folder = trained.path.parent
    run_id, journal = trained.run_id or read_sent(folder).run_id, read_id(folder)
    if not trained.config or (run_id is None and journal is None):
        return None
    is_served = weights != "trained" or not trained.facts.get("has_average")
    step = trained.step if is_served else None
    return ModelInput(run_id, step, journal, str(folder.absolute()))


def find_model(client: Any, model: Any, uri: str) -> tuple[str | None, str | None]:
    """The run of a training and the model that it logged, by their ids; None where they are not.

    model: a `ModelInput`, as a journal holds it. uri: the store's, without secrets.

    Raises:
        PendingError: the training's journal has still to send them there.
    """
    if model is None:
        return None, None
    own, info = ModelInput(*model), None
    found: list[Any] = []
    try:
        if (info := _training(client, own)) is not None and own.step is not None:
            query = f"source_run_id = '{info.run_id}'"
            found = client.search_logged_models([info.experiment_id], query)
    except Exception as error:  # it was trained elsewhere, or this server knows no models
        if not is_refusal(error):
            raise
    named = (m.model_id for m in found if m.params.get("step") == str(own.step))
    training, model_id = info and info.run_id, next(named, None)
    is_missing = training is None or (model_id is None and own.step is not None)
    if is_missing and is_pending(Path(own.folder), own.journal, uri):
        raise PendingError(
            "its training's own record has not reached MLflow; first: "
            f"python -m dan_dist.tracking replay {own.folder}"
        )
    return training, model_id


def _training(client: Any, own: ModelInput) -> Any:
    """What MLflow knows of a training's run; None: it is not there, as far as can be told."""
    if own.run_id is not None:
        return client.get_run(own.run_id).info
    if own.journal is None:
        return None
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{JOURNAL_TAG}` = '{own.journal}'")
    return runs[0].info if runs else None


def linked(record: Mapping[str, Any]) -> dict[str, str]:
    """The data set of an evaluation's metrics, by which MLflow groups them at the model."""
    if not record.get("datasets"):
        return {}
    return {f"dataset_{k}": v for k, v in DatasetInput(**record["datasets"][0]).key.items()}


def _source(text: str) -> tuple[str, dict[str, str]]:
    """MLflow's kind of a source, and where it is."""
    scheme = text.partition("://")[0] if "://" in text else ""
    if scheme in ("http", "https"):
        return "http", {"url": text}
    if scheme == "s3":
        return "s3", {"uri": text}
    return "local", {"uri": text if scheme else str(Path(text).absolute())}
