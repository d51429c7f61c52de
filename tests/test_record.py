"""A run's record in MLflow stays true when the run resumes, and is shown where there is one."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import single
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.journal_files import read_sent
from dan_dist.tracking.store import connect

Write = Callable[[str], Path]


def recorded(folder: Path, store: str) -> tuple[Any, dict[str, Any]]:
    """The run of a folder, and its artifact config.yaml."""
    client = connect(store)
    run = client.get_run(read_sent(folder).run_id)
    path = client.download_artifacts(run.info.run_id, "config.yaml")
    return run, yaml.safe_load(Path(path).read_text())


@pytest.mark.slow
def test_what_changes_when_a_run_goes_on_is_recorded(
    tiny: Write, tmp_path: Path, store: str
) -> None:
    options = ["tracking.enabled=true", "train.log_every=2"]
    single(tiny("run"), *options, "train.max_steps=2")
    single(tiny("run"), *options, "train.max_steps=4")
    single(tiny("run"), *options, "train.max_steps=6", "data.threads=1")
    run, config = recorded(tmp_path / "run", store)
    assert run.data.params["train.max_steps"] == "2" and run.data.params["data.threads"] == "None"
    assert run.data.tags["train.max_steps"] == "2; from step 2: 4; from step 4: 6"
    assert run.data.tags["data.threads"] == "None; from step 4: 1"
    assert config["train"]["max_steps"] == 6 and config["data"]["threads"] == 1
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert sum('"kind": "config"' in line for line in lines) == 2
    single(tiny("run"), *options, "train.max_steps=6", "data.threads=1")  # nothing has changed
    again = (tmp_path / "run" / "journal.jsonl").read_text()
    assert again.count('"kind": "config"') == 2


@pytest.mark.slow
def test_the_run_is_shown_where_there_is_one(
    tiny: Write, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    options = ["tracking.enabled=true", "train.max_steps=2"]
    single(tiny("run"), *options)
    assert caplog.text.count(f"to look at it: mlflow ui --backend-store-uri {store}") == 1
    page = r"look at the run: http://127\.0\.0\.1:5000/#/experiments/1/runs/(\w+)\?workflowType="
    found = re.findall(rf"{page}machine_learning$", caplog.text, re.MULTILINE)
    assert found == [read_sent(tmp_path / "run").run_id]
    caplog.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    single(tiny("away"), *options)
    with pytest.raises(ValueError, match=r"train\.global_batch"):
        single(tiny("failed"), *options, "train.global_batch=1000")
    assert "finished after 2 steps" in caplog.text and "look at the run" not in caplog.text
