"""What launchers leave in the environment, and what is wrong with it."""

import os
import threading

import pytest

from dan_dist.redaction import redact
from dan_dist.run.environment import (
    Launch,
    has_launcher,
    is_deepspeed_launched,
    read_launch,
    take_local_rank,
)
from dan_dist.values import variables

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK",
         "TORCHELASTIC_RUN_ID")  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that one that a test makes goes with it
        monkeypatch.delenv(name)


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
            "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
DEEPSPEED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2",
             "CROSS_RANK": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "launch", "launched", "by_deepspeed"),
    [
        ({}, Launch(0, 0, 1, 1), False, False),
        ({"RANK": "", "WORLD_SIZE": ""}, Launch(0, 0, 1, 1), False, False),
        (TORCHRUN, Launch(5, 1, 8, 4), True, False),
        (DEEPSPEED, Launch(1, 1, 2, 2), True, True),
    ],
)
def test_launches(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], launch: Launch, launched: bool,
    by_deepspeed: bool,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == launch
    assert has_launcher() == launched and is_deepspeed_launched() == by_deepspeed


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"RANK": "one"}, "RANK is 'one' in the environment, expected a number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0' in the environment, expected a number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x' in the environment, expected a number"),
        ({"LOCAL_WORLD_SIZE": "?"}, r"LOCAL_WORLD_SIZE is '\?' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0 in the environment, expected 1 or more"),
        (
            {"LOCAL_WORLD_SIZE": "-2"},
            "LOCAL_WORLD_SIZE is -2 in the environment, expected 1 or more",
        ),
        ({"RANK": "8"}, "RANK is 8 in the environment, expected 0 to 7"),
        ({"RANK": "-1"}, "RANK is -1 in the environment, expected 0 to 7"),
        (
            {"RANK": ""},
            "WORLD_SIZE is 8 in the environment, but RANK is not there: set it to 0 to 7",
        ),
        (
            {"LOCAL_WORLD_SIZE": "", "LOCAL_RANK": "3"},
            "LOCAL_RANK is 3 in the environment, but LOCAL_WORLD_SIZE is not there: set it to the",
        ),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK is 4 in the environment, expected 0 to 3"),
    ],
)
def test_bad_values_are_named(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str], line: str
) -> None:
    for name, value in {**TORCHRUN, **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{line}"):
        read_launch()


@pytest.mark.parametrize(
    "option", [["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]]
)
@pytest.mark.parametrize("given", [None, "3"])
def test_a_launchers_option_is_taken_from_the_command_line(
    option: list[str], given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    if given is not None:
        monkeypatch.setenv("LOCAL_RANK", given)
    assert take_local_rank(["demo", *option, "optim.lr=1"]) == ["demo", "optim.lr=1"]
    assert read_launch().local_rank == 3


@pytest.mark.parametrize("words", [["--local-rank"], ["--local-rank=x"], ["--local_rank=2"]])
def test_a_launchers_option_that_contradicts_is_named(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match=r"^--local.rank is .*, LOCAL_RANK is '3' in the env"):
        take_local_rank(words)


def test_the_environment_is_read_while_a_thread_changes_it() -> None:
    """As threads of MLflow's do."""
    name, ended = "DAN_TEST_TOKEN", threading.Event()

    def change() -> None:
        while not ended.is_set():
            os.environ[name] = "s3cr3t-value"
            os.environ.pop(name)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3000):
            assert redact("nothing") == "nothing"
            assert variables().get(name, "") in ("", "s3cr3t-value")
    finally:
        ended.set()
        thread.join()
