"""Evaluation: the same to the bit at every world size, and scikit-learn's figures."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics

from conftest import LAUNCH, copied, launch, run, torchrun
from dan_dist.evaluation import evaluate as evaluation
from dan_dist.evaluation.judge import MISTAKES, judge_classes
from dan_dist.evaluation.metrics import BINS, calibrate, class_scores, confusion, summarise
from dan_dist.options import EvaluateOptions
from dan_dist.run import checkpoint
from shards.format import ShardSet
from shards.packing.writer import pack
from shards.releases import synthetic

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def predictions() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Of 200 images of four classes; one has no images, another is never predicted."""
    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet([1, 1, 1, 0.01], 200).astype(np.float32)
    return probabilities, rng.integers(0, 3, 200)


def test_scores_are_scikit_learns(
    predictions: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    probabilities, labels = predictions
    predicted = probabilities.argmax(axis=1)
    matrix = confusion(probabilities, labels)
    assert (matrix == sklearn_metrics.confusion_matrix(labels, predicted, labels=range(4))).all()
    expected = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(4), zero_division=0
    )
    scores = class_scores(matrix, NAMES)
    for key, column in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert np.allclose([scores[name][key] for name in NAMES], column, rtol=1e-12), key
    summary = summarise(matrix, NAMES)
    assert summary["accuracy"] == sklearn_metrics.accuracy_score(labels, predicted)
    balanced = sklearn_metrics.balanced_accuracy_score(labels, predicted)
    assert summary["mean_recall"] == pytest.approx(balanced, rel=1e-12)
    assert "recall/d" not in summary


def test_calibration_by_hand() -> None:
    """Two images at 0.8, one of them right; one at 1.0, right: |0.5 − 0.8|·2/3 + 0."""
    probabilities = np.array([[0.8, 0.2], [0.2, 0.8], [1.0, 0.0]], np.float32)
    found = calibrate(probabilities, np.array([0, 0, 0]))
    assert found.error == pytest.approx(0.2, rel=1e-6)
    assert found.images.sum() == 3 and found.images[BINS - 1] == 1
    assert found.images[int(0.8 * BINS) - 1 : int(0.8 * BINS) + 1].sum() == 2


def test_the_judge_of_a_training_is_that_of_a_report(faces: ShardSet) -> None:
    """One result: its details hold the same numbers; they cost nothing until they are asked for."""
    split = faces.split("val")
    rows = np.random.default_rng(0).dirichlet(np.ones(8), len(split)).astype(np.float32)
    result = judge_classes(rows, split, "run, epoch 1")
    details = result.details()
    assert details.figures[0] == result.figure and result.figure.name == "confusion_matrix.png"
    assert result.metrics["accuracy"] == result.right.mean() == details.values["accuracy"]
    assert details.metrics["mean_recall"] == result.metrics["mean_recall"]
    recalls = {name: s["recall"] for name, s in details.values["classes"].items()}
    assert recalls == {name: result.metrics[f"recall/{name}"] for name in faces.class_names}
    assert [f.name for f in details.figures] == [
        "confusion_matrix.png", "reliability.png", "mistakes.png",
    ]  # fmt: skip
    confidences = [mistake["confidence"] for mistake in details.values["mistakes"]]
    assert confidences == sorted(confidences, reverse=True)
    assert len(confidences) == (~result.right).sum()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards with more validation images than fit a batch."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    pack(synthetic.release(8, 72, size=32, seed=5), folder, size=32, workers=1)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_file(
    dan_run: Path, many: str, tmp_path: Path, ranks: int
) -> None:
    """As one rank; two ranks by the documented command."""
    options = EvaluateOptions(checkpoint=dan_run, data=many, output=tmp_path / "one",
                              no_tracking=True)  # fmt: skip
    evaluation.main(options)
    words = [dan_run, "--data", many, "--output", tmp_path / "more", "--no-tracking"]
    if ranks == 2:
        done = run(*torchrun(ranks), LAUNCH / "evaluate.py", *words, cwd=tmp_path)
    else:
        done = launch("evaluate", ranks, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "72 images" in done.stdout
    one, more = ((tmp_path / f / evaluation.REPORT).read_bytes() for f in ("one", "more"))
    assert one == more


def test_numbers_and_figures_are_in_the_file_and_in_mlflow(
    dan_run: Path, many: str, faces: ShardSet, tmp_path: Path, store: str
) -> None:
    output = tmp_path / "out"
    evaluation.main(EvaluateOptions(checkpoint=dan_run, data=many, output=output))
    report = json.loads((output / evaluation.REPORT).read_bytes())
    assert report["images"] == sum(map(sum, report["confusion_matrix"])) == 72
    matrix = np.array(report["confusion_matrix"])
    pairs = np.repeat(np.argwhere(matrix >= 0), matrix.ravel(), axis=0)
    expected = sklearn_metrics.precision_recall_fscore_support(
        *pairs.T, labels=range(8), zero_division=0
    )
    for key, column in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [s[key] for s in report["classes"].values()] == pytest.approx(list(column)), key
    wrong = 72 - np.trace(matrix)
    assert len(report["mistakes"]) == min(wrong, MISTAKES)
    assert {m["true"] for m in report["mistakes"]} <= set(faces.class_names)

    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name='dan_dist'")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["eval/accuracy"] == report["accuracy"]
    assert logged.data.metrics["eval/f1/happy"] == report["classes"]["happy"]["f1"]
    artifacts = client.list_artifacts(logged.info.run_id)
    pictures = {"confusion_matrix.png", "reliability.png", "mistakes.png"}
    assert {a.path for a in artifacts} >= {evaluation.REPORT, *pictures}


def test_the_trainings_own_evaluation_is_this_one(
    dan_run: Path, faces: ShardSet, tmp_path: Path
) -> None:
    trained = copied(dan_run, tmp_path / "run")
    last = checkpoint.load(trained / "best.pt")["metrics"]
    options = EvaluateOptions(checkpoint=trained, data=str(faces.root), no_tracking=True)
    assert evaluation.main(options)["accuracy"] == last["accuracy"]
    assert (trained / "best-synthetic-val" / evaluation.REPORT).is_file()


def other_classes(run: Path, path: Path) -> Path:
    content = checkpoint.load(run / "best.pt")
    content["class_names"] = [f"a{k}" for k in range(8)]
    torch.save(content, path / "other.pt")
    return path / "other.pt"


def a_name_less(run: Path, path: Path) -> Path:
    content = checkpoint.load(run / "best.pt")
    del content["class_names"][-1]
    torch.save(content, path / "less.pt")
    return path / "less.pt"


def not_finite(run: Path, path: Path) -> Path:
    content = checkpoint.load(run / "best.pt")
    content["objective"]["network.classifier.bias"][3] = float("nan")
    torch.save(content, path / "nan.pt")
    return path / "nan.pt"


def foreign(_: Path, path: Path) -> Path:
    torch.save({"weights": torch.zeros(3)}, path / "foreign.pt")
    return path / "foreign.pt"


def a_text(_: Path, path: Path) -> Path:
    (path / "run.yaml").write_text("train: {}")
    return path / "run.yaml"


@pytest.mark.parametrize(
    ("make", "split", "line"),
    [
        (lambda r, t: t / "none.pt", None, r"none\.pt: no such checkpoint"),
        (lambda r, t: t, "val", r"best\.pt: no such checkpoint"),
        (foreign, "val", r"foreign\.pt: neither a checkpoint of this project nor the authors' DAN"),
        (a_text, "val", r"run\.yaml: not a readable checkpoint"),
        (other_classes, "val", r"8 classes \(a0, a1.*has 8 \(neutral, happy.*: 0 in common"),
        (a_name_less, "val", r"missing or of another shape: classifier\.weight"),
        (not_finite, "val", r"nan\.pt: .*1 of 8 values are not finite"),
        (lambda r, t: r, "test", r"no split 'test', it has train, val"),
    ],
)  # fmt: skip
def test_an_evaluation_is_refused_in_one_line(
    baseline_run: Path, faces: ShardSet, tmp_path: Path,
    make: Callable[[Path, Path], Path], split: str | None, line: str,
) -> None:  # fmt: skip
    path = make(baseline_run, tmp_path)
    options = EvaluateOptions(checkpoint=path, data=str(faces.root), split=split,
                              output=tmp_path / "out", no_tracking=True)  # fmt: skip
    with pytest.raises((ValueError, OSError), match=line):
        evaluation.main(options)
    assert not list(tmp_path.rglob(evaluation.REPORT))
