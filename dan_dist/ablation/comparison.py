"""How the runs of an ablation compare: tables, a paired test, figures, and MLflow's own pages."""

import json
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binom

from dan_dist.ablation.answer import (
    Answer,
    Pair,
    find_answer,
    grouped_view,
    is_tested,
    note,
    title,
)
from dan_dist.ablation.figures import accuracy_figure, curves_figure
from dan_dist.ablation.grid import varied
from dan_dist.ablation.runs import RunSummary
from dan_dist.evaluation.records import check_comparable
from dan_dist.tracking.figures import save
from dan_dist.tracking.journal_files import read_sent
from dan_dist.tracking.parent import ParentRecord, compare_page, publish

FOLDER = "comparison"  # of tables and figures, in the ablation's
TESTED = ("accuracy", "mean_recall", "macro_f1")  # on the test split, where there is one

Row = dict[str, Any]


def table(summaries: Sequence[RunSummary]) -> list[Row]:
    """A row for each setting, in the grid's order: means and deviations over its finished runs.

    Accuracies and the like are in per cent; a deviation is the sample's, 0 for a single run.
    """
    rows = []
    for setting in dict.fromkeys(r.run.setting for r in summaries):
        own = [r for r in summaries if r.run.setting == setting]
        done = [r for r in own if r.status == "finished"]
        row: Row = {**own[0].run.values, "runs": len(own), "finished": len(done)}
        if done:
            if all(r.test for r in done):
                for name in TESTED:
                    row |= _spread(f"test_{name}", [100 * r.test[name] for r in done if r.test])
            row |= _spread("last_accuracy", [100 * r.last["accuracy"] for r in done])
            row |= _spread("best_accuracy", [100 * r.best["accuracy"] for r in done])
            row["best_epoch"] = statistics.mean(r.best["epoch"] for r in done)
            for name in _others(done):
                row |= _spread(name, [100 * r.last[name] for r in done])
            row["parameters"] = int(_cost(done[0], "parameters"))
            row["gflops"] = _cost(done[0], "gflops")
            rates = [v for r in done for _, v in r.curves.get("train/images_per_s", [])]
            row["images_per_s"] = statistics.median(rates) if rates else None
            row["minutes"] = statistics.mean(r.minutes for r in done)
        rows.append(row)
    return rows


def _cost(run: RunSummary, name: str) -> float:
    """What the run's network costs: a tag; in records of earlier versions, a metric."""
    if (key := f"model/{name}") in run.curves:
        return run.curves[key][0][1]
    return float(run.tags[f"network.{name}"])


def _others(done: Sequence[RunSummary]) -> list[str]:
    """The names of the metrics of all classes together, beside the accuracy."""
    return [name for name in done[0].last if "/" not in name and name != "accuracy"]


def _spread(name: str, values: Sequence[float]) -> Row:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: statistics.mean(values), f"{name}_deviation": deviation}


def pairs(summaries: Sequence[RunSummary]) -> list[Pair]:
    """Every two settings, for each seed that both have finished.

    Folds of one seed hold different images, whose counts are added. Pairs of images share persons
    and images: McNemar's test, which wants independent ones, is not for them. Runs that were judged
    on other images are a ValueError.
    """
    found: dict[tuple[str, str, int], list[int]] = {}
    for a, b in combinations(summaries, 2):
        if (a.run.seed, a.run.fold) != (b.run.seed, b.run.fold):
            continue
        if (both := _right(a, b)) is None:
            continue
        first, second = both
        sums = found.setdefault((a.run.setting, b.run.setting, a.run.seed), [0, 0, 0])
        for k, images in enumerate((first & ~second, second & ~first, first | ~first)):
            sums[k] += int(images.sum())
    return [
        Pair(*key, 100 * (only_first - only_second) / images, only_first, only_second,
             mcnemar(only_first, only_second))
        for key, (only_first, only_second, images) in found.items()
    ]  # fmt: skip


def _right(a: RunSummary, b: RunSummary) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Which images each has right, of the same ones; None where one has none.

    By the files of predictions; runs of earlier versions have their last evaluation alone.
    """
    if a.right is None or b.right is None:
        return None
    if a.fingerprint != b.fingerprint:
        raise ValueError(f"{a.run.name} and {b.run.name} were trained on other data")
    if a.predictions is None or b.predictions is None:
        return a.right, b.right
    check_comparable(a.predictions, b.predictions)
    return a.predictions.right, b.predictions.right


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact p: twice the chance of so few heads among so many fair coins, at most 1."""
    few, coins = min(only_first, only_second), only_first + only_second
    return min(1.0, 2 * float(binom.cdf(few, coins, 0.5)))


def markdown(name: str, summaries: Sequence[RunSummary], rows: Sequence[Row], found: Sequence[Pair],
             judged: str, answer: Answer) -> str:  # fmt: skip
    """The comparison as people read it, the answer first."""
    axes = list(summaries[0].run.values)
    others = _others([r for r in summaries if r.status == "finished"])
    tested = [name for name in TESTED if any(f"test_{name}" in row for row in rows)]
    head = [*axes, "runs", *(f"{name.replace('_', ' ')}, test" for name in tested),
            "accuracy, last epoch", "accuracy, best epoch",
            *(f"{name.replace('_', ' ')}, last" for name in others),
            "parameters", "GFLOPs", "img/s", "minutes"]  # fmt: skip
    lines = [f"# Ablation: {name}", "", answer.words(), "", _line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [row[axis] for axis in axes]
        cells.append(f"{row['finished']} of {row['runs']}")
        if row["finished"]:
            cells += [
                *(_mean(row, f"test_{name}") if f"test_{name}" in row else "–" for name in tested),
                _mean(row, "last_accuracy"),
                f"{_mean(row, 'best_accuracy')} (epoch {row['best_epoch']:.3g})",
                *(_mean(row, other) for other in others),
                f"{row['parameters']:,}", f"{row['gflops']:.2f}",
                f"{row['images_per_s']:.0f}" if row["images_per_s"] else "–",
                f"{row['minutes']:.1f}",
            ]  # fmt: skip
        lines.append(_line([*cells, *["–"] * (len(head) - len(cells))]))
    lines += ["", f"{_spoken(summaries, judged)} GFLOPs: one image's forward pass, 2 a "
              "multiply-add."]  # fmt: skip
    missing = [r for r in summaries if r.status != "finished"]
    if missing:
        lines += ["", "Not finished:", ""]
        lines += [f"- {r.run.name}: {r.status}{': ' + r.reason if r.reason else ''}"
                  for r in missing]  # fmt: skip
    if found:
        lines += ["", *_paired_lines(rows, answer.best, found)]
    return "\n".join(lines) + "\n"


def _spoken(summaries: Sequence[RunSummary], judged: str) -> str:
    """What the figures are of, and what chose the best epochs."""
    seeds, folds = ({getattr(r.run, key) for r in summaries} for key in ("seed", "fold"))
    over = f"{len(seeds)} seeds"
    if len(folds) > 1:
        over = f"{len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'} × {len(folds)} folds"
    is_one = len(seeds) * len(folds) == 1
    spread = "; one seed: a difference may be chance." if is_one else (
        f", mean ± deviation over {over}.")  # fmt: skip
    chosen = ", ".join(sorted({r.selected_on for r in summaries if r.status == "finished"}))
    test = " Test: on the test split, by the chosen weights." if any(
        r.test for r in summaries) else ""  # fmt: skip
    return f"Per cent of {judged}{spread} selected_on: {chosen}.{test}"


def _paired_lines(rows: Sequence[Row], champion: str, found: Sequence[Pair]) -> list[str]:
    """Each setting beside the best one, whose rows a reader looks at first."""
    lines = [
        f"## Against {champion}, image by image", "",
        _line(["setting", "points more than it", "it alone is right", "setting alone is right",
               "p of each seed"]),
        _line(["---"] * 5),
    ]  # fmt: skip
    for setting in dict.fromkeys(s for pair in found for s in pair[:2]):
        own = [p for p in found if {p.first, p.second} == {setting, champion}]
        if setting == champion or not own:
            continue
        turned = [p if p.first == champion else _turn(p) for p in own]
        lines.append(_line([
            setting, f"{statistics.mean(-p.difference for p in turned):+.2f}",
            *(", ".join(str(getattr(p, key)) for p in turned)
              for key in ("only_first", "only_second")),
            ", ".join(f"{p.p:.2g}" for p in turned),
        ]))  # fmt: skip
    whose = "the test split's" if is_tested(rows) else "the last epoch's"
    return [*lines, "", f"McNemar's exact test on {whose} predictions; p is not corrected for the "
            "number of comparisons."]  # fmt: skip


def _turn(pair: Pair) -> Pair:
    return Pair(pair.second, pair.first, pair.seed, -pair.difference, pair.only_second,
                pair.only_first, pair.p)  # fmt: skip


def _mean(row: Row, name: str) -> str:
    deviation = f" ± {row[f'{name}_deviation']:.2f}" if row["finished"] > 1 else ""
    return f"{row[name]:.2f}{deviation}"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows with a header; a cell that a row lacks is empty."""
    pd.DataFrame(rows, dtype=object).to_csv(path, index=False, lineterminator="\r\n")


class Compared(NamedTuple):
    """A comparison, as it is written and as it is answered."""

    text: str  # Markdown
    rows: list[Row]
    answer: Answer


def compare(name: str, summaries: Sequence[RunSummary], folder: Path) -> Compared:
    """Writes tables and figures of the finished runs into `folder`."""
    done = [r for r in summaries if r.status == "finished"]
    if not done:
        states = ", ".join(f"{r.run.name} {r.status}" for r in summaries)
        raise ValueError(f"no run has finished, there is nothing to compare: {states}")
    rows, found = table(summaries), pairs([r for r in done if r.judged != "pairs"])
    judged = f"{0 if done[0].right is None else len(done[0].right)} {done[0].judged}"
    axes = list(summaries[0].run.values)
    answer = find_answer(rows, axes, found, done[0].judged)
    text = markdown(name, summaries, rows, found, judged, answer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(text)
    write_csv(folder / "comparison.csv", rows)
    write_csv(folder / "pairs.csv", [pair._asdict() for pair in found])
    runs = [{**r.run._asdict(), "status": r.status, "reason": r.reason, "run_id": r.run_id,
             "last": r.last, "best": r.best, "minutes": r.minutes} for r in summaries]  # fmt: skip
    content = {"settings": rows, "runs": runs, "pairs": [pair._asdict() for pair in found]}
    (folder / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
    save(accuracy_figure(rows, axes, name, judged), folder / "accuracy.png")
    save(curves_figure([(r.run.setting, r.curves) for r in done], name), folder / "curves.png")
    return Compared(text, rows, answer)


def publish_comparison(
    name: str, parent: str, experiment: str, summaries: Sequence[RunSummary], folder: Path
) -> list[str]:
    """Compares the finished runs, on disk and in MLflow.

    Returns the last lines for people: where MLflow shows them, and the answer in words.
    """
    ended = [folder / r.run.name for r in summaries if r.status != "missing"]
    states = {r.status for r in summaries}
    status = "FINISHED" if states == {"finished"} else "RUNNING"
    compared = compare(name, summaries, folder / FOLDER)
    print(compared.text)
    axes = list(summaries[0].run.values)
    answer = compared.answer
    pages = publish(
        folder / FOLDER,
        ParentRecord(
            experiment=experiment,
            name=parent,
            title=title(summaries),
            note=note(answer, compared.rows, axes),
            status="FAILED" if "failed" in states else status,
            metrics=answer.metrics(),
            tags={"kind": "ablation", "ablation": name, "best_setting": answer.best,
                  "answer": answer.words()},
            image="accuracy.png",
            view=grouped_view(varied([r.run for r in summaries])),
        ),
        ended,
    )  # fmt: skip
    done = [folder / r.run.name for r in summaries if r.status == "finished"]
    run_ids = [run_id for own in done if (run_id := read_sent(own).run_id)]
    return [
        f"the ablation in MLflow: {pages.run}",
        f"its settings, seeds grouped: {pages.view}",
        f"compare in MLflow: {compare_page(run_ids, pages.experiment_id)}",
        answer.words(),
    ]
