"""What a run is computed on, as MLflow's inputs: data sets by name and digest, and the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dan_dist.data.mixture import JoinedSet
from dan_dist.model.weights import Trained
from dan_dist.tracking.faults import PartlyRefusedError, is_refusal, noted, send_entries
from dan_dist.tracking.journal import read_sent
from dan_dist.tracking.names import fit_value
from shards.format import ShardSet, Split

DIGEST_LETTERS = 32  # of a fingerprint: MLflow takes 36 at most
NAME_LETTERS = 500
MOST_CLASSES = 100  # whose images are counted each


class DatasetInput(NamedTuple):
    """A split of a data set, for one purpose."""

    name: str  # <data set>/<split>: MLflow knows an input by its name and digest
    fingerprint: str
    context: str  # train, val or test
    source: str  # the shards' folder or URL
    release: str
    profile: dict[str, Any]  # counts


class ModelInput(NamedTuple):
    """The model that a training logged at a step."""

    run_id: str
    step: int


def dataset_inputs(
    shards: ShardSet, splits: Mapping[str, Split], source: str
) -> list[dict[str, Any]]:
    """{context: split} of a data set as plain values, for a journal; of several, each by itself."""
    if isinstance(shards, JoinedSet):
        return [
            own
            for part in shards.parts
            for own in dataset_inputs(
                part.shards,
                {context: part.shards.split(split.name) for context, split in splits.items()},
                str(part.shards.root),
            )
        ]
    fingerprint = shards.fingerprint or "unknown"
    return [
        DatasetInput(
            f"{shards.dataset}/{split.name}", fingerprint, context, source, shards.release,
            _profile(split),
        )._asdict()
        for context, split in splits.items()
    ]  # fmt: skip


def _profile(split: Split) -> dict[str, Any]:
    counts = {
        name: int((split.index["label"] == k).sum())
        for k, name in enumerate(split.class_names[: MOST_CLASSES + 1])
    }
    profile: dict[str, Any] = {"num_rows": len(split), "classes": len(split.class_names)}
    return profile | ({"images": counts} if len(counts) <= MOST_CLASSES else {})


def log_inputs(client: Any, run_id: str, record: Mapping[str, Any]) -> None:
    """Links a run with its data sets and its model; once, however often it is called.

    Raises:
        PartlyRefusedError: of some; the others are linked.
    """
    from mlflow.entities import Dataset, InputTag, LoggedModelInput
    from mlflow.entities import DatasetInput as Input

    datasets, refused = [], dict[str, str]()
    for values in record["datasets"]:
        own = DatasetInput(**values)
        kind, source = _source(own.source)
        tags = {"mlflow.data.context": own.context, "fingerprint": own.fingerprint,
                "release": own.release}  # fmt: skip
        dataset = Dataset(
            fit_value(own.name, NAME_LETTERS), own.fingerprint[:DIGEST_LETTERS], kind,
            json.dumps(source), profile=json.dumps(own.profile),
        )  # fmt: skip
        labels = [InputTag(k, fit_value(v, NAME_LETTERS)) for k, v in tags.items()]
        datasets.append((own.name, Input(dataset, labels)))
    with noted(refused):
        send_entries("data set", datasets, lambda few: client.log_inputs(run_id, few))
    if (model := find_model(client, record.get("model"))) is not None:
        known = client.get_run(run_id).inputs
        if model not in [m.model_id for m in (known.model_inputs if known else [])]:
            links = [(model, LoggedModelInput(model))]
            with noted(refused):
                send_entries("model", links, lambda few: client.log_inputs(run_id, models=few))
    if refused:
        raise PartlyRefusedError(refused)


def model_of(trained: Trained) -> ModelInput | None:
    """The model that the training of a checkpoint logs of it, where MLflow has that training.

    A checkpoint that is older than MLflow's answer does not name its run: its folder does.
    """
    run_id = trained.run_id or read_sent(trained.path.parent).run_id
    return None if run_id is None else ModelInput(run_id, trained.step)


def find_model(client: Any, model: Any) -> str | None:
    """The id of the model that a training logged; None where this store has none.

    model: a `ModelInput`, as a journal holds it.
    """
    if model is None:
        return None
    own = ModelInput(*model)
    try:
        experiment = client.get_run(own.run_id).info.experiment_id
        found = client.search_logged_models([experiment], f"source_run_id = '{own.run_id}'")
    except Exception as error:
        if is_refusal(error):  # it was trained elsewhere, or this server knows no models
            return None
        raise
    return next((m.model_id for m in found if m.params.get("step") == str(own.step)), None)


def linked(record: Mapping[str, Any]) -> dict[str, str]:
    """The data set of an evaluation's metrics, by which MLflow groups them at the model."""
    if not record.get("datasets"):
        return {}
    own = DatasetInput(**record["datasets"][0])
    name = fit_value(own.name, NAME_LETTERS)
    return {"dataset_name": name, "dataset_digest": own.fingerprint[:DIGEST_LETTERS]}


def _source(text: str) -> tuple[str, dict[str, str]]:
    """MLflow's kind of a source, and where it is."""
    scheme = text.partition("://")[0] if "://" in text else ""
    if scheme in ("http", "https"):
        return "http", {"url": text}
    if scheme == "s3":
        return "s3", {"uri": text}
    return "local", {"uri": text if scheme else str(Path(text).absolute())}
