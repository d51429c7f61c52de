"""The arithmetic of a run: steps, learning rates, what is due after each step."""

import pytest
from pydantic import ValidationError

from dan_dist.config import Config
from dan_dist.run.plan import Due, Plan, make_plan

NOTHING, SAVE, BOTH = Due(False, False), Due(False, True), Due(True, True)


def plan(
    *, images: int = 80, start: int = 0, schedule: dict | None = None, **train: object
) -> Plan:
    """Of a run of three epochs of ten steps, unless it is changed."""
    options = {"epochs": 3, "global_batch": 8, "output": "run", **train}
    tree = {"data": {"shards": "s"}, "optim": {"lr": 0.5}, "schedule": schedule or {},
            "train": options}  # fmt: skip
    return make_plan(Config.model_validate(tree), images=images, start=start)


@pytest.mark.parametrize(
    ("images", "train", "steps", "total"),
    [
        (80, {}, 10, 30),
        (87, {}, 10, 30),  # the images that do not fill a batch wait for the next epoch
        (80, {"global_batch": 80}, 1, 3),
        (80, {"max_steps": 7}, 10, 7),
        (80, {"max_steps": 30}, 10, 30),
        (80, {"max_steps": 99}, 10, 30),  # it shortens a run alone
    ],
)
def test_steps_of_an_epoch_and_of_the_run(
    images: int, train: dict[str, object], steps: int, total: int
) -> None:
    own = plan(images=images, **train)
    assert (own.steps_per_epoch, own.total) == (steps, total)


def test_epochs_count_from_one_and_end_with_their_last_step() -> None:
    own = plan()
    assert [own.epoch(step) for step in (1, 10, 11, 20, 21, 30)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "epochs"),
    [
        ({}, [0.5, 0.5, 0.5, 0.5]),
        ({"gamma": 0.5}, [0.5, 0.25, 0.125, 0.0625]),
        ({"name": "step", "gamma": 0.1, "every": 2}, [0.5, 0.5, 0.05, 0.05]),
        ({"name": "step", "gamma": 0.1, "every": 9}, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_learning_rates(schedule: dict, epochs: list[float]) -> None:
    """One an epoch, from its first step to its last."""
    own = plan(epochs=4, schedule=schedule)
    for number, expected in enumerate(epochs):
        rates = {own.lr(step) for step in range(10 * number + 1, 10 * number + 11)}
        assert len(rates) == 1 and rates.pop() == pytest.approx(expected, rel=1e-12)


def test_the_rate_is_a_function_of_the_step_alone() -> None:
    whole = plan(schedule={"gamma": 0.5})
    for own in (plan(start=17, schedule={"gamma": 0.5}),
                plan(epochs=9, schedule={"gamma": 0.5})):  # fmt: skip
        assert [own.lr(step) for step in range(1, 31)] == [whole.lr(s) for s in range(1, 31)]


def test_only_the_step_schedule_takes_an_interval() -> None:
    with pytest.raises(ValidationError, match=r"schedule\.every: only schedule\.name=step"):
        plan(schedule={"gamma": 0.5, "every": 2})


@pytest.mark.parametrize(
    ("train", "step", "evaluated", "asked", "due"),
    [
        ({}, 0, None, False, NOTHING),  # the start of a new run
        ({}, 0, None, True, NOTHING),  # there is nothing to save
        ({}, 1, None, False, NOTHING),
        ({}, 10, None, False, BOTH),  # an epoch's end
        ({}, 30, 20, False, BOTH),  # the run's end
        ({}, 5, None, True, SAVE),  # a rank asks
        ({"checkpoint_every": 4}, 4, None, False, SAVE),
        ({"checkpoint_every": 4}, 5, None, False, NOTHING),
        ({"checkpoint_every": 4}, 12, 10, False, SAVE),
        ({"checkpoint_every": 5}, 10, None, False, BOTH),  # the interval and the epoch's end
        ({"max_steps": 7}, 7, None, False, BOTH),  # shortened: its end is in mid-epoch
        ({"start": 7}, 7, None, False, NOTHING),  # resumed in mid-epoch: saved already
        ({"start": 7}, 7, None, True, NOTHING),
        ({"start": 8, "checkpoint_every": 4}, 8, None, False, NOTHING),
        ({"start": 10}, 10, 10, False, NOTHING),  # resumed at an epoch's end: evaluated already
        ({"start": 10}, 10, None, False, BOTH),  # a signal came before the evaluation
        ({"start": 10}, 11, 10, True, SAVE),
        ({"start": 7, "max_steps": 7}, 7, None, False, BOTH),  # ended at its last checkpoint
        ({"start": 30}, 30, 30, False, NOTHING),  # finished already
        ({"start": 30, "epochs": 4}, 30, 30, False, NOTHING),  # extended
        ({"start": 30, "epochs": 4}, 40, 30, False, BOTH),
        ({"start": 7, "epochs": 3}, 7, 7, False, NOTHING),  # extended from a mid-epoch end
    ],
)
def test_what_is_due(
    train: dict[str, object], step: int, evaluated: int | None, asked: bool, due: Due
) -> None:
    assert plan(**train).due(step, evaluated=evaluated, asked=asked) == due  # type: ignore[arg-type]


def test_a_run_evaluates_each_epoch_once_however_often_it_is_interrupted() -> None:
    """The story's loop in small, with a stop after every third step."""
    found: list[int] = []
    start, evaluated = 0, None
    while start < 30:
        own = plan(start=start)
        for step in range(start, own.total + 1):
            due = own.due(step, evaluated=evaluated, asked=step == start + 3)
            if due.evaluate:
                found.append(step)
                evaluated = step
            if due.save and step >= start + 3:
                break
        start = step
    assert found == [10, 20, 30]


def test_a_run_beyond_its_end_is_refused() -> None:
    line = r"train\.output run is at step 31 already, train\.epochs and train\.max_steps end at 30"
    with pytest.raises(ValueError, match=line):
        plan(start=31)
    assert plan(start=30).start == plan(start=30).total
