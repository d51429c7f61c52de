"""Evaluation: the same to the bit at every world size, and scikit-learn's figures."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics

from conftest import DAN, REPOSITORY, run, single
from dan_dist.run import checkpoint
from dan_dist.evaluation import evaluate as evaluation
from dan_dist.evaluation.metrics import BINS, calibrate, class_scores, confusion, summarise
from shards.format import ShardSet
from shards.releases import synthetic
from shards.packing.writer import pack

Write = Callable[[str], Path]
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


def evaluate(*arguments: str | Path, ranks: int, cwd: Path) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run(
        *torchrun, f"--nproc-per-node={ranks}", REPOSITORY / "launch" / "evaluate.py", *arguments,
        cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_any_number_of_ranks_gives_the_same_file(
    tiny: Write, faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of DAN, over more images than fit a batch; its figures and numbers are in MLflow as well."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    pack(synthetic.release(8, 72, size=32, seed=5), tmp_path / "many", size=32, workers=1)
    trained = single(tiny("run"), *DAN, "train.max_steps=3")
    files = []
    for ranks in (1, 2, 3):
        output = tmp_path / f"ranks{ranks}"
        extra = [] if ranks == 1 else ["--no-tracking"]
        evaluate(tmp_path / "run", "--data", tmp_path / "many", "--output", output, *extra,
                 ranks=ranks, cwd=tmp_path)  # fmt: skip
        files.append((output / evaluation.REPORT).read_bytes())
    assert files[0] == files[1] == files[2]
    report = json.loads(files[0])
    assert report["images"] == sum(map(sum, report["confusion_matrix"])) == 72
    matrix = np.array(report["confusion_matrix"])
    pairs = np.repeat(np.argwhere(matrix >= 0), matrix.ravel(), axis=0)
    expected = sklearn_metrics.precision_recall_fscore_support(
        *pairs.T, labels=range(8), zero_division=0
    )
    for key, column in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [s[key] for s in report["classes"].values()] == pytest.approx(list(column)), key
    wrong = 72 - np.trace(matrix)
    assert len(report["mistakes"]) == min(wrong, evaluation.MISTAKES)
    assert {m["true"] for m in report["mistakes"]} <= set(faces.class_names)

    (experiment,) = mlflow.MlflowClient(store).search_experiments(filter_string="name='dan_dist'")
    (logged,) = mlflow.MlflowClient(store).search_runs([experiment.experiment_id])
    assert logged.data.metrics["eval/accuracy"] == report["accuracy"]
    assert logged.data.metrics["eval/f1/happy"] == report["classes"]["happy"]["f1"]
    artifacts = mlflow.MlflowClient(store).list_artifacts(logged.info.run_id)
    pictures = {"confusion_matrix.png", "reliability.png", "mistakes.png"}
    assert {a.path for a in artifacts} >= {evaluation.REPORT, *pictures}

    # The training's own evaluation of its shards is this one.
    own = evaluation.main(tmp_path / "run", str(faces.root), tracked=False)
    assert own["accuracy"] == trained.metrics["accuracy"]
    assert (tmp_path / "run" / "best-synthetic-val" / evaluation.REPORT).is_file()


def other_classes(tmp_path: Path) -> Path:
    content = checkpoint.load(tmp_path / "run" / "best.pt")
    content["class_names"][0] = "indifferent"
    torch.save(content, tmp_path / "other.pt")
    return tmp_path / "other.pt"


def a_name_less(tmp_path: Path) -> Path:
    content = checkpoint.load(tmp_path / "run" / "best.pt")
    del content["class_names"][-1]
    torch.save(content, tmp_path / "less.pt")
    return tmp_path / "less.pt"


def not_finite(tmp_path: Path) -> Path:
    content = checkpoint.load(tmp_path / "run" / "best.pt")
    content["objective"]["network.classifier.bias"][3] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    return tmp_path / "nan.pt"


def foreign(tmp_path: Path) -> Path:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    return tmp_path / "foreign.pt"


@pytest.mark.parametrize(
    ("make", "split", "line"),
    [
        (lambda t: t / "none.pt", None, r"none\.pt: no such checkpoint"),
        (lambda t: t, "val", r"best\.pt: no such checkpoint"),
        (foreign, "val", r"foreign\.pt: neither a checkpoint of this project nor the authors' DAN"),
        (lambda t: t / "run.yaml", "val", r"run\.yaml: not a readable checkpoint"),
        (other_classes, "val", r"8 classes \(indifferent, happy.*has 8 \(neutral, happy"),
        (a_name_less, "val", r"missing or of another shape: classifier\.weight"),
        (not_finite, "val", r"nan\.pt: the output is not finite for 16 of 16 images"),
        (lambda t: t / "run", "test", r"no split 'test', it has train, val"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said_in_one_line(
    tiny: Write, faces: ShardSet, tmp_path: Path, make: Callable[[Path], Path],
    split: str | None,
    line: str,
) -> None:  # fmt: skip
    single(tiny("run"), "train.max_steps=1")
    with pytest.raises((ValueError, OSError), match=line):
        evaluation.main(make(tmp_path), str(faces.root), split=split, tracked=False)
    assert not list(tmp_path.rglob(evaluation.REPORT))
