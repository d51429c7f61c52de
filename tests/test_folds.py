"""Ablations over folds and on a test split: runs, means, deviations, the paired test."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from test_answer import summary

from conftest import single
from dan_dist.ablation import comparison, grid, runs
from dan_dist.ablation.runs import RunSummary, read_summary
from dan_dist.config import load_config
from dan_dist.evaluation.records import PREDICTIONS, Predictions
from dan_dist.evaluation.result import RESULT
from dan_dist.run.signals import StopRequest
from shards.format import ShardSet

Write = Callable[[str], Path]


def predicted(right: list[bool], split: str = "holdout", start: int = 0) -> Predictions:
    """Of so many images of class a, of which these are right."""
    keys = np.array([f"k{start + k}" for k in range(len(right))])
    words = np.where(right, "a", "b")
    rows = np.ones((len(right), 2), np.float32)
    labels = np.array(["a"] * len(right))
    return Predictions(Path(f"{split}.parquet"), keys, labels, words, rows, {"split": split})


def of_fold(heads: str, fold: str, right: list[bool], start: int) -> RunSummary:
    made = summary(heads, 0, [False] * len(right), float(np.mean(right)))
    return made._replace(run=made.run._replace(fold=fold), selected_on="holdout",
                         predictions=predicted(right, start=start))  # fmt: skip


def test_a_grid_goes_over_folds(tiny: Write, tmp_path: Path) -> None:
    _, axes, _ = grid.parse(["model.heads=0,1"])
    words = ["tracking.enabled=true"]
    found = grid.grid_runs(str(tiny("base")), axes, words, 2, tmp_path / "g", "heads", 3)
    assert len(found) == 12 and len({run.name for run in found}) == 12
    assert found[2].name == "heads-0-seed-0-fold-2" and found[2].setting == found[0].setting
    config = load_config(tiny("base"), found[2].overrides)
    assert config.data.fold == "2/3" == found[2].fold and config.train.seed == 0


def test_runs_that_would_share_a_folder_are_refused(tiny: Write, tmp_path: Path) -> None:
    _, axes, _ = grid.parse(["model.backbone=runs/a/b.pth,runs/a_b.pth"])
    with pytest.raises(ValueError, match=r"would both have the folder .*runs_a_b"):
        grid.grid_runs(str(tiny("base")), axes, ["tracking.enabled=true"], 1, tmp_path / "g", "b")


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_ranks_are_launched(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """By torchrun; one trains as it is."""
    _, axes, _ = grid.parse(["model.heads=0,1"])
    grid_runs = grid.grid_runs(
        str(tiny("base")), axes, ["tracking.enabled=true"], 1, tmp_path / "g", "heads"
    )
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(runs, "_run", lambda command, stop: commands.append(command) or 0)
    runs.train_missing(str(tiny("base")), grid_runs, tmp_path / "g", ranks, StopRequest())
    for command, run in zip(commands, grid_runs, strict=True):
        words = ["-m", "dan_dist", "train", str(tiny("base")), *run.overrides]
        assert command[0] == sys.executable and command[-len(words) :] == words
        launcher = command[1 : -len(words)]
        assert ("--nproc-per-node=2" in launcher) if ranks == 2 else not launcher


def test_folds_of_a_seed_are_added(tmp_path: Path) -> None:
    """Two folds of 4 and 3 images: heads 2 alone has 3 of the 7 right, heads 1 alone 1."""
    one = [[True, False, False, True], [False, True, False]]
    two = [[True, True, True, False], [True, True, False]]
    summaries = [
        of_fold(heads, f"{k + 1}/2", right[k], 4 * k)
        for k in range(2) for heads, right in (("1", one), ("2", two))
    ]  # fmt: skip
    (pair,) = comparison.pairs(summaries)
    assert (pair.only_first, pair.only_second) == (1, 3)
    assert pair.difference == pytest.approx(-100 * 2 / 7)
    assert pair.p == comparison.mcnemar(1, 3)
    rows = comparison.table(summaries)
    assert rows[0]["last_accuracy"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)
    text = comparison.compare("heads", summaries, tmp_path / "out").text
    assert "mean ± deviation over 1 seed × 2 folds. selected_on: holdout." in text


def test_the_test_split_is_what_is_compared(tmp_path: Path) -> None:
    shown = []
    for heads, right in (("1", [True, False, False]), ("2", [True, True, True])):
        made = summary(heads, 0, [True, True], 0.5 if heads == "1" else 0.75)
        share = float(np.mean(right))
        shown.append(made._replace(
            predictions=predicted(right, "test"),
            test={"accuracy": share, "mean_recall": share, "macro_f1": share},
        ))  # fmt: skip
    compared = comparison.compare("heads", shown, tmp_path / "out")
    text = compared.text
    assert compared.answer.words() == (
        "best: heads 2, 75.00 % of validation images (one run); next: heads 1, 50.00 %, 25.00 "
        "points less; of test images: 100.00 and 33.33 %. McNemar's p of the two on test images: "
        "0.5: the lead may be chance"
    )
    assert "| accuracy, test | mean recall, test | macro f1, test |" in text
    assert "## Against heads 2, image by image" in text and "test split's predictions" in text
    assert "| heads 1 | -66.67 | 2 | 0 | 0.5 |" in text
    other = shown[1]._replace(predictions=predicted([True] * 3, "val"))
    with pytest.raises(ValueError, match=r"test\.parquet and val\.parquet are of different splits"):
        comparison.pairs([shown[0], other])


def test_a_summary_reads_the_files_of_its_run(faces: ShardSet, tiny: Write, tmp_path: Path) -> None:
    """And a run whose test split was not looked at is not finished."""
    config = tiny("run")
    words = ["train.max_steps=2"]
    single(config, *words)
    run = grid.AblationRun("run", {"heads": "0"}, 0, words)
    found = read_summary(run, load_config(config, words))
    assert found.predictions is not None and found.test is None and found.right is not None
    assert (found.predictions.right == found.right).all()
    assert not (tmp_path / "run" / RESULT).exists()
    tested = load_config(config, [*words, "data.test_split=test"])
    assert read_summary(run, tested).status == "missing"
    (tmp_path / "run" / PREDICTIONS).unlink()  # as a run of an earlier version
    old = read_summary(run, load_config(config, words))
    assert old.predictions is None and (old.right == found.right).all()
