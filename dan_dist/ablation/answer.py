"""What an ablation has found, in words: the best setting, and whether that is more than chance."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dan_dist.ablation.runs import RunSummary

CHANCE = 0.05  # a p above may be chance
# of the description's table: the choice is made by validation images, the test stands beside it
COLUMNS = {
    "last_accuracy": "accuracy, last epoch", "best_accuracy": "best epoch",
    "test_accuracy": "test",
}  # fmt: skip
SECTION = "answer"  # of the charts
CURVES = ("val/accuracy", "val/loss", "train/accuracy")


class Pair(NamedTuple):
    """Two settings' predictions on the same images, with the same seed; of all folds together."""

    first: str
    second: str
    seed: int
    difference: float  # accuracy of the first minus the second, in points
    only_first: int  # images that it alone has right
    only_second: int
    p: float  # McNemar's exact test: as unequal or more by chance


class Answer(NamedTuple):
    """The setting of the highest mean accuracy at the last epoch, beside the next one."""

    best: str
    accuracy: float  # per cent, mean over runs: seeds, and folds of each
    deviation: float
    runs: int
    next: str | None  # None where nothing else has finished
    next_accuracy: float
    next_deviation: float
    next_runs: int
    ps: tuple[float, ...]  # of each seed that both have finished
    better_in: int  # of these seeds
    judged: str  # what the accuracies are of: "validation images", or the like
    tested: str  # what each p is of: these, or "test images"
    tests: tuple[float, ...] = ()  # per cent of the test images, where both were judged by them

    def words(self) -> str:
        """The answer in a sentence or two."""
        many = f"(mean ± standard deviation of {self.runs} runs)"
        runs = many if self.runs > 1 else "(one run)"
        own = _percent(self.accuracy, self.deviation, self.runs)
        line = f"best: {self.best}, {own} of {self.judged} {runs}"
        if self.next is None:
            return f"{line}; no other setting has finished{self._test()}"
        beside = _percent(self.next_accuracy, self.next_deviation, self.next_runs)
        behind = self.accuracy - self.next_accuracy
        line += f"; next: {self.next}, {beside}, {behind:.2f} points less{self._test()}"
        if not self.ps:
            return f"{line}; no seed is shared, by whose images the two could be tested"
        ps = ", ".join(f"{p:.2g}" for p in self.ps)
        each = f"McNemar's p of the two on {self.tested}"
        each += ", seed by seed" if len(self.ps) > 1 else ""
        return f"{line}. {each}: {ps}: the lead {self._verdict()}"

    def _test(self) -> str:
        means = " and ".join(f"{mean:.2f}" for mean in self.tests)
        return f"; of test images: {means} %" if means else ""

    def _verdict(self) -> str:
        count = len(self.ps)
        if self.better_in == count and max(self.ps) < CHANCE:
            found = "is more than chance on these images"
            return f"{found}, with each seed" if count > 1 else f"{found}; other seeds may differ"
        which = "no seed" if min(self.ps) >= CHANCE else "not every seed"
        return "may be chance" + (f", {which} shows it with p below {CHANCE}" * (count > 1))

    def metrics(self) -> dict[str, float]:
        """The answer as metrics of the run that holds the others."""
        found = {"best/accuracy": self.accuracy / 100, "best/deviation": self.deviation / 100}
        if self.next is not None:
            found["best/lead"] = (self.accuracy - self.next_accuracy) / 100
        return found | ({"best/p_max": max(self.ps)} if self.ps else {})


def find_answer(
    rows: Sequence[Mapping[str, Any]], axes: Sequence[str], found: Sequence[Pair], judged: str
) -> Answer:
    """The answer of a table's rows, of which one at least has finished, and of its pairs.

    judged: what the accuracies are of, in words.
    """
    ranked = sorted((row for row in rows if row["finished"]), key=lambda row: -row["last_accuracy"])
    best, *others = ranked
    name = setting_of(best, axes)
    own = best["last_accuracy"], best["last_accuracy_deviation"], best["finished"]
    tested = "test images" if is_tested(rows) else judged
    tests = tuple(row["test_accuracy"] for row in ranked[:2] if is_tested(rows))
    if not others:
        return Answer(name, *own, None, 0.0, 0.0, 0, (), 0, judged, tested, tests)
    second = setting_of(others[0], axes)
    pairs = [p for p in found if {p.first, p.second} == {name, second}]
    leads = [p.difference if p.first == name else -p.difference for p in pairs]
    return Answer(
        name, *own, second, others[0]["last_accuracy"], others[0]["last_accuracy_deviation"],
        others[0]["finished"],
        tuple(p.p for p in pairs), sum(lead > 0 for lead in leads),
        judged, tested, tests,
    )  # fmt: skip


def is_tested(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every finished setting has been judged by test images, by which pairs then are."""
    return all("test_accuracy" in row for row in rows if row["finished"])


def setting_of(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    """A row's values, as `AblationRun.setting` writes them."""
    return ", ".join(f"{axis} {row[axis]}" for axis in axes)


def title(summaries: Sequence[RunSummary]) -> str:
    """What is varied, for people: heads 0, 1, 2, 4 (2 seeds)."""
    parts = []
    for axis in summaries[0].run.values:
        values = dict.fromkeys(r.run.values[axis] for r in summaries)
        parts.append(f"{axis} {', '.join(values)}")
    seeds = len({r.run.seed for r in summaries})
    return f"{' × '.join(parts)} ({seeds} seed{'s' if seeds > 1 else ''})"


def note(answer: Answer, rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> str:
    """The description of the ablation's run: answer, figure, and a table that is not wide."""
    columns = {key: text for key, text in COLUMNS.items() if any(key in row for row in rows)}
    lines = [
        f"**{answer.words()}**", "", "![Accuracy of each setting]({image})", "",
        f"| setting | {' | '.join(columns.values())} | runs |", f"|---|{'---|' * len(columns)}---|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: -row.get("last_accuracy", -1.0)):
        cells = [
            _percent(row[key], row[f"{key}_deviation"], row["finished"]) if key in row else "–"
            for key in columns
        ]
        runs = f"{row['finished']} of {row['runs']}"
        lines.append(f"| {setting_of(row, axes)} | {' | '.join(cells)} | {runs} |")
    lines += [
        "", "McNemar's test sees the chance in the choice of images, not that in the seeds; p is "
        "not corrected for the number of settings.",
        "", "In full: the artifacts comparison.md, comparison.csv, pairs.csv.",
    ]  # fmt: skip
    return "\n".join(lines)


def grouped_view(keys: Sequence[str]) -> dict[str, Any]:
    """MLflow's charts of an ablation's runs as they open: seeds are grouped by their setting.

    keys: of the configuration, which vary. Runs that have not finished are left out.
    """
    charts = [_chart("BAR", "val/accuracy"), *(_chart("LINE", metric) for metric in CURVES)]
    return {
        "compareRunCharts": charts,
        "isAccordionReordered": True,  # sections in this order, not by their names
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [
            {"uuid": SECTION, "name": "Which setting is best", "display": True,
             "isReordered": False, "deleted": False}
        ],
        "searchFilter": "tags.`mlflow.parentRunId` = '{run_id}' "
                        "and attributes.status = 'FINISHED'",
        "orderByKey": "metrics.`val/accuracy`",
        "orderByAsc": False,
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": "setting"}],
        },
        "selectedColumns": ["tags.`setting`", "metrics.`val/accuracy`", "metrics.`val/loss`",
                            "metrics.`train/accuracy`", *(f"params.`{key}`" for key in keys)],
    }  # fmt: skip


def _chart(kind: str, metric: str) -> dict[str, Any]:
    """A chart as MLflow's pages describe it."""
    return {
        "uuid": f"{kind}-{metric}", "type": kind, "metricKey": metric,
        "selectedMetricKeys": [metric], "metricSectionId": SECTION, "deleted": False,
        "isGenerated": False, "runsCountToCompare": 100, "lineSmoothness": 0,
        "scaleType": "linear", "xAxisScaleType": "linear", "xAxisKey": "step",
        "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [], "range": {},
    }  # fmt: skip


def _percent(value: float, deviation: float, runs: int) -> str:
    return f"{value:.2f} ± {deviation:.2f} %" if runs > 1 else f"{value:.2f} %"
