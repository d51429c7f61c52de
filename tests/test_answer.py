"""What an ablation has found: tables, the paired test, the answer in words, MLflow's pages."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import binomtest
from tracking_server import TrackingServer

from dan_dist.ablation import comparison, grid
from dan_dist.ablation.answer import Answer
from dan_dist.ablation.grid import AblationRun
from dan_dist.ablation.runs import RunSummary
from dan_dist.tracking.journal_files import read_sent
from dan_dist.tracking.parent import VIEW_TAG
from dan_dist.tracking.store import connect
from dan_dist.tracking.tracker import MlflowTracker, RunRecord

CHROMIUM = shutil.which("chromium")


COST = {"network.parameters": "10", "network.gflops": "0.5"}


def summary(heads: str, seed: int, right: list[bool], accuracy: float) -> RunSummary:
    run = AblationRun(f"heads-{heads}-seed-{seed}", {"heads": heads}, seed, [])
    metrics = {"accuracy": accuracy, "mean_recall": accuracy / 2}
    curves = {
        "train/images_per_s": [(20, 100.0), (40, 300.0), (60, 200.0)],
        "train/loss": [(20, 2.0), (40, 1.0)], "val/accuracy": [(40, accuracy)],
    }  # fmt: skip
    return RunSummary(run, "finished", "", f"id-{heads}-{seed}", metrics, {**metrics, "epoch": 3},
                  np.array(right), "data", curves, COST, 1.5, "validation images")  # fmt: skip


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    """10 images: heads 1 alone has 1 of them right, heads 4 alone 6: p = 2·(1 + 7)/2⁷ = 0.125."""
    first = [True] * 3 + [True] + [False] * 6
    second = [True] * 3 + [False] + [True] * 6
    summaries = [
        summary("1", 0, first, 0.4), summary("1", 1, first, 0.6), summary("4", 0, second, 0.9),
        summary("8", 0, first, 0.4)._replace(status="failed", reason="out of memory", right=None),
    ]  # fmt: skip
    rows = comparison.table(summaries)
    assert rows[0]["last_accuracy"] == pytest.approx(50) and rows[0]["finished"] == 2
    assert rows[0]["last_accuracy_deviation"] == pytest.approx(np.std([40, 60], ddof=1))
    assert rows[0]["images_per_s"] == 200 and rows[2] == {"heads": "8", "runs": 1, "finished": 0}
    (pair,) = comparison.pairs(summaries)
    assert (pair.only_first, pair.only_second, pair.seed) == (1, 6, 0)
    assert pair.difference == pytest.approx(-50) and pair.p == pytest.approx(0.125)
    compared = comparison.compare("heads", summaries, tmp_path / "out")
    text, rows = compared.text, compared.rows
    assert rows[0]["parameters"] == 10 and rows[0]["gflops"] == 0.5
    assert compared.answer.words() == (
        "best: heads 4, 90.00 % of validation images (one run); next: heads 1, 50.00 ± 14.14 %, "
        "40.00 points less. McNemar's p of the two on validation images: 0.12: the lead may be "
        "chance"
    )
    assert text.splitlines()[2] == compared.answer.words()
    assert "| 1 | 2 of 2 | 50.00 ± 14.14 |" in text and "| 4 | 1 of 1 | 90.00 |" in text
    assert "heads-8-seed-0: failed: out of memory" in text
    assert "| heads 1 | -50.00 | 6 | 1 | 0.12 |" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"comparison.md", "comparison.csv", "comparison.json", "pairs.csv",
                     "accuracy.png", "curves.png"}  # fmt: skip


@pytest.mark.parametrize(
    ("ps", "better_in", "verdict"),
    [
        ((0.01, 0.02), 2, "is more than chance on these images, with each seed"),
        ((0.01, 0.02), 1, "may be chance, not every seed shows it with p below 0.05"),
        ((0.01, 0.2), 2, "may be chance, not every seed shows it with p below 0.05"),
        ((0.3, 0.2), 2, "may be chance, no seed shows it with p below 0.05"),
        ((0.01,), 1, "is more than chance on these images; other seeds may differ"),
        ((0.3,), 1, "may be chance"),
    ],
)
def test_the_answer_in_words(ps: tuple[float, ...], better_in: int, verdict: str) -> None:
    answer = Answer("heads 4", 80.0, 1.0, 2, "heads 1", 70.0, 2.0, 2, ps, better_in,
                    "held-out images", "test images", (78.0, 71.5))  # fmt: skip
    line = (
        "best: heads 4, 80.00 ± 1.00 % of held-out images (mean ± standard deviation of 2 runs); "
        "next: heads 1, 70.00 ± 2.00 %, 10.00 points less; of test images: 78.00 and 71.50 %. "
        "McNemar's p of the two on test images"
    )
    assert answer.words().startswith(line) and answer.words().endswith(f": the lead {verdict}")
    assert answer.metrics()["best/accuracy"] == 0.8 and answer.metrics()["best/p_max"] == max(ps)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 6), (5, 5), (40, 21), (300, 420)])
def test_mcnemars_p_is_its_closed_form(first: int, second: int) -> None:
    """Twice the share of the 2ⁿ outcomes of n coins with so few of the rarer side, at most 1."""
    coins, few = first + second, min(first, second)
    outcomes = sum(math.comb(coins, k) for k in range(few + 1))
    expected = min(1.0, 2 * outcomes / 2**coins)
    assert comparison.mcnemar(first, second) == pytest.approx(expected, rel=1e-12)
    assert comparison.mcnemar(second, first) == comparison.mcnemar(first, second)
    if coins:
        test = binomtest(first, coins).pvalue
        assert comparison.mcnemar(first, second) == pytest.approx(test, rel=1e-12)


def test_other_data_cannot_be_compared() -> None:
    a, b = summary("1", 0, [True], 1.0), summary("2", 0, [True], 1.0)
    with pytest.raises(ValueError, match=r"heads-1-seed-0 and heads-2-seed-0 .* other data"):
        comparison.pairs([a, b._replace(fingerprint="else")])


def test_the_keys_that_a_grid_varies() -> None:
    shared = ["train.seed=0", "train.output=a", "tracking.tags.setting=x", "optim.lr=1"]
    other = ["train.seed=1", "train.output=b", "tracking.tags.setting=y", "optim.lr=1"]
    runs = [AblationRun("", {}, 0, [*shared, "loss.fcn=center"]),
            AblationRun("", {}, 1, [*other, "model.fusion=mean", "loss.fcn=none"])]  # fmt: skip
    assert grid.varied(runs) == ["loss.fcn", "model.fusion"]


class Published(NamedTuple):
    """An ablation that MLflow holds: its summaries, its folder, and the last lines for people."""

    summaries: list[RunSummary]
    folder: Path
    lines: list[str]


@pytest.fixture
def published(server: TrackingServer, tmp_path: Path) -> Published:
    """Of two fusions and two seeds, of which one failed; recorded as trainings record them."""
    folder, found = tmp_path / "grid", []
    for fusion, seed in (("mean", 0), ("sum", 0), ("mean", 1), ("sum", 1)):
        accuracy = 0.8 if fusion == "sum" else 0.6 + seed / 10
        name, words = f"fusion-{fusion}-seed-{seed}", [f"model.fusion={fusion}"]
        run = AblationRun(name, {"fusion": fusion}, seed, words)
        status = "failed" if (fusion, seed) == ("sum", 1) else "finished"
        params = {"model.heads": 2, "model.fusion": fusion, "train.seed": seed}
        record = RunRecord(experiment="dan_dist", name=name, params=params, config={},
                           tags={**COST, "setting": run.setting}, parent="p")  # fmt: skip
        with MlflowTracker(folder / name, record) as tracker:
            for step, value in ((0, 0.125), (40, accuracy)):
                tracker.metrics({"val/accuracy": value, "val/loss": 1 - value}, step)
                tracker.metrics({"train/accuracy": value, "train/lr": 0.1}, step + 20)
            tracker.conclude(status.upper())
        right = [k < 10 * accuracy for k in range(10)]
        found.append(summary("", seed, right, accuracy)._replace(run=run, status=status))
    lines = comparison.publish_comparison("fusion", "p", "dan_dist", found, folder)
    return Published(found, folder, lines)


def test_mlflows_pages_are_of_finished_runs(
    published: Published, server: TrackingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where MLflow is away, the answer in words has been printed and written all the same."""
    api, finished = connect(server.url), {s.run.name for s in published.summaries[:3]}
    experiment = api.get_experiment_by_name("dan_dist")
    view = json.loads(experiment.tags[VIEW_TAG + "p"])
    runs = api.search_runs([experiment.experiment_id], view["searchFilter"])
    assert {run.info.run_name for run in runs} == finished
    assert view["selectedColumns"][-2:] == ["metrics.`train/accuracy`", "params.`model.fusion`"]
    page = next(line for line in published.lines if line.startswith("compare in MLflow"))
    for own in published.summaries:
        run_id = read_sent(published.folder / own.run.name).run_id
        assert run_id and (run_id in page) == (own.run.name in finished)
    capsys.readouterr()
    server.faults["api"] = (503, "busy")
    with pytest.raises(OSError, match="the comparison is in"):
        comparison.publish_comparison(
            "fusion", "p", "dan_dist", published.summaries, published.folder
        )
    answer = published.lines[-1]
    assert answer.startswith("best: fusion sum, 80.00 % of validation images (one run); next: ")
    text = (published.folder / comparison.FOLDER / "comparison.md").read_text()
    assert text.splitlines()[2] == answer and answer in capsys.readouterr().out


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_compares_by_accuracy(published: Published, tmp_path: Path) -> None:
    """The compare page opens on val/accuracy; the ablation's page shows the answer in words."""
    page = published.lines[2].rsplit(" ", 1)[1]
    shown = dump(page, tmp_path)
    axes = re.findall(r'class="axis-title"[^>]*data-unformatted="([^"]*)"', shown)
    assert axes == ["model.fusion", "train.seed", "val/accuracy"]  # of the parallel coordinates
    assert all(own.run.name in shown for own in published.summaries[:3]), shown[:2000]
    own = published.lines[0].rsplit(" ", 1)[1]
    assert published.lines[-1] in dump(own, tmp_path)


def dump(page: str, folder: Path) -> str:
    """A page as a headless browser renders it."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder}/browser", "--virtual-time-budget=20000", "--dump-dom", page,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout
