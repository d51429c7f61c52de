"""The state of a run, as its checkpoints hold it."""

from dataclasses import fields

import torch

from dan_dist.run.checkpoint import KEYS, RESUMED
from dan_dist.run.state import TrainState


def test_a_checkpoint_gives_back_what_it_was_given() -> None:
    state = TrainState(
        step=7, best={"accuracy": 0.5, "epoch": 1}, metrics={"accuracy": 0.25}, evaluated=5,
        right=torch.tensor([True, False]), replaced=3, replaced_since=2,
        figures=[[1.0, 2.0, 3.0, 4.0, 5.0]], run_id="abc",
    )  # fmt: skip
    content = {**state.as_dict(), "objective": {}, "config": {}}
    assert TrainState.from_checkpoint(content).as_dict() == state.as_dict()


def test_a_field_that_earlier_versions_did_not_write_has_its_default() -> None:
    assert TrainState.from_checkpoint({"step": 7}) == TrainState(step=7)


def test_new_states_share_nothing() -> None:
    first, second = TrainState(), TrainState()
    first.figures.append([1.0])
    first.best["accuracy"] = 1.0
    assert second == TrainState() and second.step == 0 and second.evaluated is None


def test_every_field_that_a_checkpoint_must_hold_is_written() -> None:
    """Beside what the engine, the data and the configuration give."""
    others = {"config", "fingerprint", "class_names", "objective", "optimizer"}
    names = {field.name for field in fields(TrainState)}
    assert set(RESUMED) - others <= names and set(KEYS) - others <= names
