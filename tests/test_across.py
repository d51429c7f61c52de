"""Judging across data sets, by groups, with intervals; files of predictions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from conftest import copied
from dan_dist.data.mixture import Part, join
from dan_dist.evaluation import evaluate as evaluation
from dan_dist.evaluation import matrix
from dan_dist.evaluation.groups import NOT_LISTED, judge_groups, read_groups
from dan_dist.evaluation.intervals import intervals, wilson
from dan_dist.evaluation.judge import find_intervals, judge_sets
from dan_dist.evaluation.metrics import confusion, summarise
from dan_dist.evaluation.records import (
    PREDICTIONS,
    check_comparable,
    image_keys,
    read_predictions,
    write_predictions,
)
from dan_dist.model.classes import meet
from dan_dist.options import EvaluateCommand, EvaluateOptions
from dan_dist.run import checkpoint
from shards.format import ShardSet, open_shardset
from shards.packing.writer import pack
from shards.release import Release
from shards.releases import synthetic
from shards.releases.affectnet import CLASSES

SEVEN = ("Surprised", "fear", "disgust", "happiness", "Sadness", "angry", "neutral")
EIGHT = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")


def without(release: Release, names: dict[str, str]) -> Release:
    """A release of these classes alone: name here → name there, in this order."""
    labels = {release.class_names.index(own): k for k, own in enumerate(names)}
    splits = {
        split: [i._replace(label=labels[i.label]) for i in items if i.label in labels]
        for split, items in release.splits.items()
    }
    return replace(release, class_names=tuple(names.values()), splits=splits)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The validation faces of `faces`, without contempt, under other names in another order."""
    canonical = [EIGHT[own] for own, _ in meet(EIGHT, SEVEN)]
    release = without(synthetic.release(80, 16, size=32, seed=7),
                      dict(zip(canonical, SEVEN, strict=True)))  # fmt: skip
    folder = tmp_path_factory.mktemp("seven") / "seven"
    pack(release, folder, size=32, workers=1)
    return open_shardset(folder)


def test_classes_meet_by_name() -> None:
    assert meet(EIGHT, SEVEN) == [(3, 0), (4, 1), (5, 2), (1, 3), (2, 4), (6, 5), (0, 6)]
    assert meet(EIGHT, ("a", "FEAR")) == [(4, 1)] and meet(EIGHT, ("a", "b")) == []
    for own, other in ((("happy", "happiness"), EIGHT), (EIGHT, ("sad", "x", "Sadness"))):
        with pytest.raises(ValueError, match=r"(happy, happiness|sad, Sadness): two names for one"):
            meet(own, other)


@pytest.mark.slow
def test_eight_classes_judged_on_seven(
    dan_run: Path, faces: ShardSet, seven: ShardSet, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As if the network had no logit of contempt, and the data no such image."""
    caplog.set_level("INFO")
    options = EvaluateOptions(checkpoint=dan_run, data=str(seven.root), no_tracking=True,
                              output=tmp_path / "seven")  # fmt: skip
    report = evaluation.main(options)
    whole = evaluation.main(replace(options, data=str(faces.root), output=tmp_path / "eight"))
    eight = read_predictions(tmp_path / "eight" / PREDICTIONS)
    own = read_predictions(tmp_path / "seven" / PREDICTIONS)
    assert whole["classes_met"] == {name: name for name in EIGHT}
    assert whole["left_out"] == {"network": [], "data": {}}
    assert report["left_out"] == {"network": ["contempt"], "data": {}}
    assert report["classes_met"]["happy"] == "happiness" and "happy = happiness" in caplog.text
    assert "left out of the network, as the data has none: contempt" in caplog.text
    columns = [EIGHT.index(name) for name in report["classes_met"]]
    among = eight.probabilities[:, columns]
    expected = dict(zip(eight.keys, among / among.sum(axis=1, keepdims=True), strict=True))
    found = dict(zip(own.keys, own.probabilities, strict=True))
    assert len(found) == report["images"] == 14
    for key, row in found.items():
        assert row == pytest.approx(expected[key], rel=2e-2), key  # bfloat16


@pytest.mark.slow
def test_seven_classes_judged_on_eight(dan_run: Path, faces: ShardSet, tmp_path: Path) -> None:
    """The data's images of a class that the network does not know are left out and counted."""
    content = checkpoint.load(dan_run / "best.pt")
    keep = [k for k, name in enumerate(EIGHT) if name != "fear"]
    objective = content["objective"]
    ending = [k for k in objective if k.startswith(("network.classifier.", "network.logit_norm."))]
    for key in (k for k in ending if objective[k].ndim):
        objective[key] = objective[key][keep]
    content["class_names"] = [EIGHT[k] for k in keep]
    torch.save(content, path := tmp_path / "seven.pt")
    options = EvaluateOptions(checkpoint=path, data=str(faces.root), no_tracking=True,
                              output=tmp_path / "out")  # fmt: skip
    report = evaluation.main(options)
    assert report["left_out"] == {"network": [], "data": {"fear": 2}} and report["images"] == 14
    assert "fear" not in report["classes"]


@pytest.mark.slow
def test_a_matrix_of_runs_and_sets(
    dan_run: Path, faces: ShardSet, seven: ShardSet, tmp_path: Path, store: str
) -> None:
    """Cells are those of single evaluations; table, figure and an MLflow run hold them."""
    other = copied(dan_run, tmp_path / "other")
    shutil.copy(dan_run.parent / "mlflow.db", tmp_path)
    command = EvaluateCommand(checkpoint=(dan_run, other), data=(str(faces.root), str(seven.root)),
                              output=tmp_path / "m")  # fmt: skip
    found = matrix.main(command)
    cells = [(r["run"], r["data"]) for r in found]
    assert cells == [(f"run-{k}", d) for k in (1, 2) for d in ("faces", "seven")]
    alone = evaluation.main(EvaluateOptions(checkpoint=dan_run, data=str(seven.root),
                                            no_tracking=True, output=tmp_path / "o"))  # fmt: skip
    assert {**found[1], **alone} == found[1]
    table = pd.read_csv(tmp_path / "m" / "matrix.csv")
    assert table["macro_f1"].tolist() == pytest.approx([r["macro_f1"] for r in found])
    assert table["classes"].tolist() == [8, 7, 8, 7] and set(table["selected_on"]) == {"val"}
    text = (tmp_path / "m" / "matrix.md").read_text()
    assert "Macro f1, % (95 %)" in text and "judged on 7 classes; left out of the network" in text
    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name='dan_dist'")
    (logged,) = client.search_runs([experiment.experiment_id], "tags.kind = 'matrix'")
    assert logged.data.metrics["accuracy/run-1 on seven"] == alone["accuracy"]
    assert {a.path for a in client.list_artifacts(logged.info.run_id)} >= set(matrix.FILES)
    digests = {own.fingerprint[:32] for own in (faces, seven)}
    assert {i.dataset.digest for i in logged.inputs.dataset_inputs} == digests
    for digest in digests:  # the matrix and its two cells
        assert len(client.search_runs([experiment.experiment_id],
                                      f"dataset.digest = '{digest}'")) >= 3  # fmt: skip
    cells = client.search_runs([experiment.experiment_id], "tags.kind = 'evaluation'")
    models = {m.model_id for own in cells for m in
              client.get_run(own.info.run_id).inputs.model_inputs}  # fmt: skip
    (model,) = map(client.get_logged_model, models)  # both runs are one
    values = {(m.dataset_digest, m.value) for m in model.metrics if m.key == "eval/accuracy"}
    assert len(cells) == 4
    assert values == {(r["fingerprint"][:32], r["accuracy"]) for r in found}


def test_names_of_a_matrix_are_all_different_and_no_secrets() -> None:
    assert matrix.unlike(["a", "a", "a-2", "b"]) == ["a-1", "a-3", "a-2", "b"]
    assert matrix.unlike(["a-1", "a", "a"]) == ["a-1", "a-2", "a-3"]
    assert matrix._name("https://host/container/faces/?sig=SECRET") == "faces"
    assert matrix._name("s3://bucket/faces") == matrix._name("data/faces/") == "faces"


@pytest.mark.slow
def test_another_matrix_leaves_the_first_as_it_is(
    dan_run: Path, faces: ShardSet, tmp_path: Path
) -> None:
    """Of the same command, of other files and weights under the same names, of other runs."""
    content = checkpoint.load(dan_run / "best.pt")
    content["objective"]["network.classifier.weight"].mul_(2)
    other = tmp_path / "run"
    other.mkdir()
    torch.save(content, other / "best.pt")
    for runs, own in (((dan_run, dan_run), "auto"), ((dan_run, dan_run), "auto"),
                      ((dan_run, other), "auto"), ((other, dan_run), "auto"),
                      ((other, dan_run), "trained")):  # fmt: skip
        matrix.main(EvaluateCommand(checkpoint=runs, data=(str(faces.root),), weights=own,
                                    output=tmp_path / "m", no_tracking=True))  # fmt: skip
    assert sorted(path.parent.name for path in tmp_path.glob("m*/matrix.json")) == [
        "m", "m-2", "m-3", "m-4",
    ]  # fmt: skip
    assert len(list(tmp_path.glob("m*/run-2-on-faces*/evaluation.json"))) == 4


def test_a_set_without_common_classes_is_refused_before_anything_is_computed(
    dan_run: Path, faces: ShardSet, people: ShardSet, tmp_path: Path
) -> None:
    command = EvaluateCommand(checkpoint=(dan_run,), data=(str(faces.root), str(people.root)),
                              output=tmp_path / "m", no_tracking=True)  # fmt: skip
    with pytest.raises(ValueError, match="0 in common, at least 2 are needed"):
        matrix.main(command)
    assert not list(tmp_path.rglob(evaluation.REPORT))


def test_intervals() -> None:
    """Wilson's are scipy's; the bootstrap's, those of images drawn one by one."""
    for right, images in ((0, 5), (3, 10), (700, 800), (9, 9)):
        expected = binomtest(right, images).proportion_ci(method="wilson")
        assert wilson(right, images) == pytest.approx([expected.low, expected.high], abs=1e-12)
    rng = np.random.default_rng(0)
    labels, names = rng.integers(0, 4, 300), ("a", "b", "c", "d", "e")
    rows = (rng.random((300, 5)) + np.eye(5)[labels]).astype(np.float32)
    matrix_ = confusion(rows, labels)
    predicted = rows.argmax(axis=1)
    summary, found = summarise(matrix_, names), intervals(matrix_, names)
    macro = f1_score(labels, predicted, labels=range(4), average="macro")
    assert summary["macro_f1"] == pytest.approx(macro)
    assert set(found) == {"accuracy", "mean_recall", "macro_f1", *(f"recall/{n}" for n in "abcd")}
    drawn = []
    for _ in range(400):
        ids = np.concatenate([rng.choice(own := np.flatnonzero(labels == k), len(own))
                              for k in range(4)])  # fmt: skip
        drawn.append(f1_score(labels[ids], predicted[ids], labels=range(4), average="macro"))
    assert found["macro_f1"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.015)
    assert intervals(matrix_, names) == found
    assert all(low <= summary[key] <= high for key, (low, high) in found.items())


def test_intervals_of_several_sets(faces: ShardSet) -> None:
    """The mean's is narrower than each set's, and that of one set twice by the root of two."""
    both = join([Part(faces, 1, {}), Part(replace(faces, dataset="other"), 1, {})], None)
    split = both.split("val")
    rows = np.random.default_rng(2).dirichlet(np.ones(8), 16).astype(np.float32)
    twice = np.concatenate([rows, rows])
    figures, found = judge_sets(twice, split, "").metrics, find_intervals(twice, split)
    alone = find_intervals(rows, faces.split("val"))
    for key in ("accuracy", "mean_recall", "macro_f1"):
        assert found[f"{key}_other"] == alone[key]
        half = (np.array(alone[key]) - figures[key]) / np.sqrt(2)
        assert np.array(found[key]) - figures[key] == pytest.approx(half)


def test_predictions_are_read_as_they_were_written(faces: ShardSet, tmp_path: Path) -> None:
    split = faces.split("val")
    rows = np.random.default_rng(0).dirichlet(np.ones(8), len(split)).astype(np.float32)
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    write_predictions(one, split, rows, {"step": 3})
    found = read_predictions(one)
    assert (found.probabilities == rows).all() and found.facts["step"] == 3
    assert found.keys.tolist() == [*split.keys()] == pd.read_parquet(one)["key"].tolist()
    names = np.array(CLASSES)
    assert (found.labels == names[split.index["label"]]).all()
    assert (found.predicted == names[rows.argmax(axis=1)]).all()
    check_comparable(found, found)
    write_predictions(other, replace(split, index=split.index[1:]), rows[1:], {})
    with pytest.raises(ValueError, match=r"one\.parquet and .*other\.parquet are of different"):
        check_comparable(found, read_predictions(other))
    write_predictions(other, replace(split, index=split.index[::-1].copy()), rows, {})
    with pytest.raises(ValueError, match="differ in line 1: "):
        check_comparable(found, read_predictions(other))
    one.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"one\.parquet: not a file of predictions"):
        read_predictions(one)


def test_groups_by_key_and_by_path(faces: ShardSet, tmp_path: Path) -> None:
    split = faces.split("val")
    keys = image_keys(split)
    rows = np.eye(8, dtype=np.float32)[split.index["label"]]
    rows[:4] = rows[:4][:, [1, 2, 3, 4, 5, 6, 7, 0]]  # the first four are wrong
    lines = [f"{'old' if k < 8 else 'young'},images/{key}.jpg, x" for k, key in enumerate(keys)]
    path = tmp_path / "ages.csv"
    path.write_text(
        "\ufeffage,path,source\n" + "\n".join([*lines[:-1], "old,no/such.png,y"]) + "\n"
    )
    groups = read_groups(path, split)
    assert groups.facts == {"file": "ages.csv", "matched": 15, "images_not_listed": 1,
                            "lines_unmatched": 1}  # fmt: skip
    assert groups.columns["age"] == ["old"] * 8 + ["young"] * 7 + [NOT_LISTED]
    found = judge_groups(rows, split, groups)["columns"]["age"]
    assert found["widest_gap"] == {"accuracy": 0.5, "from": "old", "to": "young"}
    assert found["groups"]["old"]["images"] == 8 and found["groups"]["old"]["accuracy"] == 0.5
    assert found["groups"]["old"]["intervals"]["accuracy"] == wilson(4, 8)


def test_a_folders_paths_are_its_keys(shards: Path, tmp_path: Path) -> None:
    """As `shards.pack folder` makes keys of them: <class>_<stem>."""
    split = open_shardset(shards).split("train")
    source = tmp_path / "source" / "train"
    files = sorted(p.relative_to(tmp_path) for p in source.rglob("*.*") if p.is_file())
    path = tmp_path / "groups.csv"
    path.write_text("path,place\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    groups = read_groups(path, split)
    names = [split.class_names[k] for k in split.index["label"]]
    assert groups.columns["place"] == names


BAD_GROUPS = {
    "age\n3\n": r"columns age; expected 'path' or 'key', and others",
    "key\nx\n": r"columns key; expected 'path' or 'key', and others",
    "key,age\nnobody,3\n": r"none of its 1 lines is of an image of split 'val'.*first is nobody",
    "key,age\n{0},3\n{0},4\n": r"line 3: .* is line 2's image already",
    "key,age\n{0},3,4\n": r"row 2: 3 values, expected 2",
}


@pytest.mark.parametrize("text", BAD_GROUPS)
def test_groups_that_cannot_be(text: str, faces: ShardSet, tmp_path: Path) -> None:
    split = faces.split("val")
    path = tmp_path / "groups.csv"
    path.write_text(text.replace("{0}", split.key(0).split("/")[1]))
    with pytest.raises(ValueError, match=BAD_GROUPS[text]):
        read_groups(path, split)


def test_groups_in_a_report(dan_run: Path, faces: ShardSet, tmp_path: Path) -> None:
    keys = image_keys(faces.split("val"))
    path = tmp_path / "groups.csv"
    path.write_text("key,half\n" + "".join(f"{key},{k % 2}\n" for k, key in enumerate(keys)))
    options = EvaluateOptions(checkpoint=dan_run, data=str(faces.root), groups=path,
                              output=tmp_path / "out", no_tracking=True)  # fmt: skip
    report = evaluation.main(options)
    halves = report["groups"]["columns"]["half"]["groups"]
    mean = np.mean([own["accuracy"] for own in halves.values()])
    assert mean == pytest.approx(report["accuracy"]) and set(halves) == {"0", "1"}
    table = pd.read_csv(tmp_path / "out" / "groups.csv")
    assert table["accuracy"].tolist() == [halves[k]["accuracy"] for k in ("0", "1")]
    assert (tmp_path / "out" / "groups.png").is_file()
    assert json.loads((tmp_path / "out" / evaluation.REPORT).read_text()) == report
