"""Ablations: grids, their trainings, and that nothing is trained twice or mixed up."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interpreter import python
from mlflow_server import Server

from conftest import LAUNCH, REPOSITORY, run
from dan_dist import programs
from dan_dist.ablation import grid
from dan_dist.config import load_config
from dan_dist.run.signals import StopRequest

Write = Callable[[str], Path]
SCRIPT = str(LAUNCH / "ablate.py")


def test_words_become_a_grid() -> None:
    words = [
        "model.heads=1,2",
        "loss.fcn=center,none",
        "train.epochs=3",
        "data.augment.scale=[1,2]",
    ]
    name, axes, overrides = grid.parse(words)
    assert name == "heads-fcn" and [axis.name for axis in axes] == ["heads", "fcn"]
    assert axes[0].points == {"1": ["model.heads=1"], "2": ["model.heads=2"]}
    assert overrides == words[2:]
    assert grid.parse(["heads"])[1][0].points["0"] == [
        "model.heads=0", "loss.fcn=none", "loss.afn=none",
    ]  # fmt: skip
    assert grid.PRESETS["fusion"]["none"] == grid.PRESETS["heads"]["0"]
    points = grid.parse(["heads=0,4"])[1][0].points
    assert points == {k: grid.PRESETS["heads"][k] for k in ("0", "4")}
    assert grid.parse(["optim.name=adam,sgd", "schedule.name=step,exponential"])[0] == (
        "optim.name-schedule.name"
    )


def test_runs_have_names_seeds_and_a_parent_that_stays(tiny: Write, tmp_path: Path) -> None:
    config, folder = str(tiny("base")), tmp_path / "grid"
    options = ["tracking.enabled=true", "train.seed=5"]
    _, axes, _ = grid.parse(["model.heads=0,1"])
    runs = grid.grid_runs(config, axes, options, 2, folder, "heads")
    assert [run.name for run in runs] == [
        "heads-0-seed-5", "heads-1-seed-5", "heads-0-seed-6", "heads-1-seed-6",
    ]  # fmt: skip
    assert runs[0].setting == "heads 0" and runs[0].setting == runs[2].setting
    _, heads, _ = grid.parse(["heads"])  # what a point asks for comes before what holds for all
    center = grid.grid_runs(config, heads, [*options, "loss.fcn=center"], 1, tmp_path / "$", "h")
    chosen = [load_config(config, run.overrides) for run in center]
    assert [c.loss.fcn for c in chosen] == ["none"] + ["center"] * 8
    assert chosen[0].train.output == f"{tmp_path}/$/heads-0-seed-5"
    again = grid.grid_runs(config, axes, options, 1, folder, "heads")
    assert again == runs[:2]
    other = grid.grid_runs(config, axes, options, 1, tmp_path / "other", "heads")
    assert other[0].overrides != runs[0].overrides  # another parent, in MLflow too


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.epochs=1"], "nothing is varied"),
        (["head"], "'head': expected heads, fcn-loss, afn-loss"),
        (["model.heads=1,1"], "stands there twice"),
        (["model.heads=1,"], "is empty"),
        (["heads=1,9"], "9 is not of heads: 0, 1, 2"),
        (["heads", "model.heads=1,2"], r"'heads' and 'model\.heads' both set model\.heads"),
        (["heads", "loss.fcn=none,center"], r"both set loss\.fcn"),
        (["model.haeds=1,2"], r"unknown key 'model\.haeds'; did you mean 'model\.heads'\?"),
        (["model.heads=1,two"], "model.heads is 'two'"),
        (["heads", "tracking.enabled=false"], "an ablation is compared in MLflow"),
        (["heads", "model.heads=3"], "'model.heads=3': 'heads' varies model.heads already"),
        (["train.seed=1,2"], "train.seed is no axis: --seeds and --folds give each run its own"),
        (["heads", "train.output=x"], "train.output: an ablation sets it itself; --output names"),
        (["heads", "optim.lr=1", "optim.lr=2"], "optim.lr is given twice; write it once"),
    ],
)
def test_grids_that_cannot_be(tiny: Write, tmp_path: Path, words: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        name, axes, overrides = grid.parse(words)
        is_given = "tracking.enabled=false" in overrides
        tracked = overrides if is_given else ["tracking.enabled=true", *overrides]
        grid.grid_runs(str(tiny("base")), axes, tracked, 1, tmp_path / "grid", name)
    assert not list(tmp_path.glob("grid/*/journal.jsonl"))


def test_a_folder_holds_one_ablation(tmp_path: Path) -> None:
    grid.ablation_id(tmp_path, "heads")
    with pytest.raises(ValueError, match="holds the ablation 'heads'"):
        grid.ablation_id(tmp_path, "fcn-loss")
    (tmp_path / grid.IDENTITY).write_text("{}")
    with pytest.raises(ValueError, match="not the identity of an ablation"):
        grid.ablation_id(tmp_path, "heads")


def start(*words: str | Path, cwd: Path, uri: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
                   "MLFLOW_TRACKING_URI": uri}  # fmt: skip
    return subprocess.Popen(
        [python(), SCRIPT, *map(str, words)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str], timeout_s: float = 400) -> str:
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"took more than {timeout_s} s:\n{process.communicate()[0]}")


def runs_of(uri: str) -> tuple[dict[str, Any], list[Any]]:
    """The parents by their number, and the runs of the grids."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("dan_dist")
    found = client.search_runs([experiment.experiment_id])
    children = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    parents = {r.info.run_id: r for r in found if "mlflow.parentRunId" not in r.data.tags}
    return parents, children


@pytest.mark.slow
def test_stopped_and_killed_it_ends_with_each_run_once(
    tiny: Write, tmp_path: Path, store: str
) -> None:
    """Stopped in the first run, killed in the third; the configuration is a relative path."""
    import mlflow

    uri, config = store, tiny("base").name
    words = ["model.heads=0,1,2", "tracking.enabled=true", "train.max_steps=2", "--config", config]
    process = start(*words, cwd=tmp_path, uri=uri)
    assert process.stdout is not None and "1 of 3" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopped; the same command resumes" in end(process)
    assert process.returncode == 75
    process = start(*words, cwd=tmp_path, uri=uri)
    third = tmp_path / "runs" / "heads" / "heads-2-seed-0"
    deadline = time.monotonic() + 300
    while not (third / "journal.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, end(process)
        time.sleep(0.05)
    process.kill()
    process.wait()
    process = start(*words, cwd=tmp_path, uri=uri)
    printed = end(process)
    assert process.returncode == 0, printed
    assert printed.count("has finished") == 2 and "| 2 | 1 of 1 |" in printed
    parents, children = runs_of(uri)
    ((parent, run),) = parents.items()
    assert sorted(r.info.run_name for r in children) == [f"heads-{k}-seed-0" for k in range(3)]
    assert {r.info.status for r in [*children, run]} == {"FINISHED"}
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent}
    assert {r.data.tags["setting"] for r in children} == {"heads 0", "heads 1", "heads 2"}
    note, answer = (run.data.tags[key] for key in ("mlflow.note.content", "answer"))
    assert answer in note and "| heads 2 |" in note and f"run_uuid={parent})" in note
    assert run.info.run_name == "heads 0, 1, 2 (1 seed)" and printed.splitlines()[-1] == answer
    assert f"/runs/{parent}?workflowType=machine_learning" in printed
    assert run.data.tags["best_setting"] in {"heads 0", "heads 1", "heads 2"}
    best = max(child.data.metrics["val/accuracy"] for child in children)
    assert run.data.metrics["best/accuracy"] == pytest.approx(best)
    artifacts = {a.path for a in mlflow.MlflowClient(uri).list_artifacts(parent)}
    assert artifacts >= {"comparison.md", "comparison.csv", "accuracy.png", "curves.png"}
    # Other settings belong into another folder; nothing is trained.
    process = start(*words, "optim.lr=1e-4", cwd=tmp_path, uri=uri)
    assert "another configuration: optim.lr" in end(process) and process.returncode == 2


@pytest.mark.slow
def test_two_at_once_on_one_server_do_not_mix(tiny: Write, tmp_path: Path) -> None:
    """One of them has a run that fails and is named."""
    server = Server(tmp_path)
    try:
        common = ["tracking.enabled=true", "train.max_steps=1", "--config", tiny("base")]
        good = start("model.heads=0,1", *common, cwd=tmp_path, uri=server.uri)
        bad = start("data.val_split=val,none", *common, cwd=tmp_path, uri=server.uri)
        printed, complained = end(good), end(bad)
        assert good.returncode == 0, printed
        assert bad.returncode == 1 and "Not finished" in complained, complained
        assert re.search(r"val_split-none-seed-0: failed: .*no split 'none'", complained)
        parents, children = runs_of(server.uri)
        families = {
            parents[parent].data.tags["ablation"]: {
                r.info.run_name for r in children if r.data.tags["mlflow.parentRunId"] == parent
            }
            for parent in parents
        }
        names = {"heads-0-seed-0", "heads-1-seed-0"}
        assert families == {"heads": names, "val_split": {"val_split-val-seed-0"}}
        status = {r.data.tags["ablation"]: r.info.status for r in parents.values()}
        named = {r.info.run_name for r in parents.values()}
        assert named == {"heads 0, 1 (1 seed)", "val_split val, none (1 seed)"}
        assert status == {"heads": "FINISHED", "val_split": "FAILED"}
    finally:
        server.stop()


def main(*words: str | Path) -> int:
    """The program, in this process."""
    return programs._ablate([str(word) for word in words], StopRequest())


def test_nothing_finished_is_nothing_to_compare(
    tiny: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.heads=0,1", "tracking.enabled=true", "--config", tiny("base")]
    words += ["--output", tmp_path / "grid"]
    with pytest.raises(ValueError, match="nothing to compare: heads-0-seed-0 missing"):
        main(*words, "--summary")
    assert main(*words, "--list") == 0
    assert re.search(r"1 heads-1-seed-0 +missing", capsys.readouterr().out)
    with pytest.raises(ValueError, match="--seeds is 0, expected 1 to 1000"):
        main(*words, "--seeds", "0")


@pytest.mark.slow
def test_a_runs_overrides_are_printed_as_they_are_trained(tiny: Write, tmp_path: Path) -> None:
    """For batch scripts, which read them a line each."""
    folder = tmp_path / "grid"
    words = ["heads", "tracking.enabled=true", "--config", tiny("base"), "--output", folder]
    done = run(sys.executable, SCRIPT, *words, "--child", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "model.heads=1" in lines and f"train.output={folder / 'heads-1-seed-0'}" in lines
    assert load_config(tiny("base"), lines).tracking.tags["setting"] == "heads 1"
    with pytest.raises(ValueError, match="--child is 9, the grid has runs 0 to 8"):
        main(*words, "--child", "9")
