"""The model card beside an exported network: figures of these weights alone, intervals, terms."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import copied
from dan_dist.evaluation.intervals import METHOD, intervals, wilson
from dan_dist.evaluation.metrics import confusion
from dan_dist.evaluation.records import PREDICTIONS, read_predictions
from dan_dist.evaluation.result import RESULT
from dan_dist.inference.card import describe_licences, describe_results, write_card
from dan_dist.model.weights import Trained, load_trained
from dan_dist.run import checkpoint


def row(name: str, value: float, ends: list[float] | None = None) -> str:
    interval = f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}" if ends else ""
    return f"| {name} | {100 * value:.2f} % | {interval} |"


def test_a_card_gives_no_other_checkpoints_figures(dan_run: Path, tmp_path: Path) -> None:
    whole = checkpoint.load(dan_run / "best.pt")
    torch.save({**whole, "step": whole["step"] + 1}, tmp_path / "step-00000005.pt")
    other = describe_results(load_trained(tmp_path / "step-00000005.pt"))
    assert other == "The file does not name any."  # the best evaluation is another checkpoint's


def test_figures_of_the_average_are_not_those_of_the_last_step(
    dan_run: Path, tmp_path: Path
) -> None:
    whole = checkpoint.load(dan_run / "best.pt")
    average = {name: value.clone() for name, value in whole["objective"].items()}
    checkpoint.save(tmp_path / "best.pt", {**whole, "average": average})
    for weights in ("auto", "average"):
        assert row("accuracy", whole["best"]["accuracy"])[:-2] in describe_results(
            load_trained(tmp_path, weights=weights)
        )
    other = load_trained(tmp_path, weights="trained")
    assert "|" not in describe_results(other) and "average" in describe_results(other)
    # Where none was kept, those of the last step are what was evaluated.
    assert "| accuracy |" in describe_results(load_trained(dan_run, weights="trained"))


def test_intervals_are_of_the_predictions_beside_the_checkpoint(
    dan_run: Path, tmp_path: Path
) -> None:
    """All of them; without the predictions, or with those of another step, the accuracy's alone."""
    run = copied(dan_run, tmp_path / "run")
    trained, known = load_trained(run), read_predictions(run / PREDICTIONS)
    names, best = trained.class_names, trained.facts["best"]
    labels = np.array([names.index(name) for name in known.labels])
    found = intervals(confusion(known.probabilities, labels), names)
    text = describe_results(trained)
    assert known.facts["step"] == trained.step and "split `val`" in text and METHOD in text
    for name, value in best.items():
        assert name == "epoch" or row(name, value, found[name]) in text
    assert "Without an interval" not in text

    other = describe_results(trained._replace(step=trained.step + 1))
    (run / PREDICTIONS).write_bytes(b"PAR1")
    alone = describe_results(trained)
    (run / PREDICTIONS).unlink()
    assert describe_results(trained) == alone == other
    share = wilson(round(best["accuracy"] * len(labels)), len(labels))
    assert row("accuracy", best["accuracy"], share) in alone
    assert row("mean_recall", best["mean_recall"]) in alone
    assert "Without an interval: mean recall, macro f1, as the predictions" in alone


def test_means_over_several_sets_have_no_interval_of_one(dan_run: Path) -> None:
    trained = load_trained(dan_run)
    config = copy.deepcopy(trained.config)
    config["data"]["shards"] = [{"path": "data/a"}, {"path": "data/b"}]
    text = describe_results(trained._replace(config=config))
    assert row("accuracy", trained.facts["best"]["accuracy"]) in text and "Wilson" not in text
    assert "accuracy, mean recall, macro f1, as each is the mean over several sets" in text


def with_result(trained: Trained, **values: object) -> Trained:
    """Beside the checkpoint, a result of its run on the split `PrivateTest`."""
    known = {
        "split": "PrivateTest", "step": 99, "weights_of_step": trained.step, "images": 3589,
        "fingerprint": trained.facts["fingerprint"], "selected_on": "val", "looks": [{}],
        "metrics": {"accuracy": 0.71, "recall/anger": 0.6}, "intervals_method": "90 %; by hand",
        "intervals": {"accuracy": [0.7012, 0.7234]}, **values,
    }  # fmt: skip
    (trained.path.parent / RESULT).write_text(json.dumps(known))
    return trained


def test_the_test_splits_figures_are_there_if_they_are_of_these_weights(
    dan_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = load_trained(copied(dan_run, tmp_path / "run"))
    without = describe_results(trained)
    text = describe_results(with_result(trained))
    assert text.startswith(without) and text.endswith("Intervals: 90 %; by hand.")
    assert "Of the test split `PrivateTest` (3589 images), which chose nothing, looked at once" in (
        text
    )
    for line in ("| accuracy | 71.00 % | 70.12 to 72.34 |", "| recall/anger | 60.00 % |  |"):
        assert line in text.removeprefix(without)
    assert "looked at 2 times" in describe_results(with_result(trained, looks=[{}, {}]))
    for other in ({"weights_of_step": trained.step - 1}, {"fingerprint": "of another set"}):
        assert describe_results(with_result(trained, **other)) == without
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert describe_results(with_result(trained, metrics=[1])) == without
        (trained.path.parent / RESULT).write_text("{")
        assert describe_results(trained) == without
    assert caplog.text.count("the card is without the result on the test split") == 2


@pytest.mark.parametrize(
    ("named", "line"),
    [
        (["FER-2013 (0a1b2c3d)"], "  - FER-2013: see the data set's own page"),
        (["RAF-DB (0a1b2c3d)", "RAF-DB-2 (11111111)"],
         "  - RAF-DB-2: on application, for non-commercial research"),
        (["SFEW 2.0 (0a1b2c3d)"], "  - SFEW 2.0: on application, for non-commercial research"),
        (["synthetic (0a1b2c3d)"], "  - synthetic: drawn by this project, free"),
        (["folder-2 (0a1b2c3d)"], "  - folder-2: not known here"),
        (["my (own) faces (0a1b2c3d)"], "  - my (own) faces: not known here"),
        ([], "  - the file does not name its images: not known here"),
    ],
)  # fmt: skip
def test_terms_are_those_of_the_sets_that_the_file_names(named: list[str], line: str) -> None:
    assert describe_licences(named).splitlines()[-1] == line
    assert len(describe_licences(named).splitlines()) == max(1, len(named))


def test_a_card_names_its_sets(dan_run: Path) -> None:
    assert "  - synthetic: drawn" in write_card(load_trained(dan_run), "best", 17)
