"""The shipped Slurm scripts, submitted to a real Slurm of two nodes on this machine."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import layouts
import pytest
from chaos_runs import DAN, IDENTITY
from cluster import MISSING, Cluster, query, slurm, wait_for
from interpreter import python

from conftest import REPOSITORY, largest_difference, outcome, train, weights
from dan_dist.model.backbone import BACKBONE
from dan_dist.run.folder import step_path, steps_saved
from shards.format import ShardSet, open_shardset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) or os.geteuid() != 0,
        reason=f"needs root and Slurm (apt-get install slurm-wlm munge); missing: {MISSING}",
    ),
]

# Slurm signals all processes below a step's first: the ranks' programs are there where torchrun
# itself is not forked.
REAL_AGENTS = {"DAN_PYTHON": sys.executable, "PYTHON_EXEC": python()}


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    with slurm():
        yield


@pytest.fixture
def cluster(nodes: None, faces: ShardSet, tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, faces.root)


def test_two_nodes_preempted_and_requeued_end_as_if_nothing_was(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = [*DAN, "optim.lr=1e-3", "train.max_steps=20", "tracking.enabled=false"]
    own = "train.output=runs/affectnet8-2"
    job = cluster.submit("affectnet8.sh", *options, own, sbatch=("--nodes=2",),
                         **REAL_AGENTS)  # fmt: skip
    run = tmp_path / "runs" / "affectnet8-2"
    wait_for(lambda: "step 8 " in cluster.text(), 120)
    query("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    config = tmp_path / "reference.yaml"
    config.write_text(cluster.config.read_text().replace("unused", "reference"))
    train(2, config, *options, cwd=tmp_path)
    wait_for(lambda: "Restarts=1" in query("scontrol", "show", "job", "-o", job), 60)
    assert cluster.end(job) == "COMPLETED", cluster.text()
    text = cluster.text()
    assert "SIGUSR1: stopped after a checkpoint" in text and "back into the queue" in text
    assert "resumed after step" in text and outcome(run)["status"] == "finished"
    (file,) = tmp_path.glob("*.out")
    assert "step 8 " in file.read_text() and "finished after 20 steps" in file.read_text()
    assert not (tmp_path / "runs" / "affectnet8").exists()
    for node in (0, 1):
        log = run / "logs" / f"affectnet8-{job}-node{node}"
        assert log.with_suffix(".log").is_file()
        attempts = sorted(p.parent.parent.parent.name[:-9] for p in log.rglob("0/stdout.log"))
        assert attempts == [f"{job}.0", f"{job}.1"]
    assert largest_difference(weights(run), weights(tmp_path / "reference")) == 0


def test_a_jobs_own_log_holds_rank_0_and_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("rafdb.sh", "trian.epochs=3", sbatch=("--nodes=2",))
    assert cluster.end(job) == "FAILED", cluster.text()
    (own,) = tmp_path.glob("*.out")
    lines = own.read_text().splitlines()
    reason = "unknown key 'trian'; did you mean 'train'?"
    assert len(lines) < 12 and "Traceback" not in own.read_text(), lines
    assert f"error: {cluster.config}: {reason}" in lines
    assert lines[-1].startswith(f"error: the run ended as failed: {cluster.config}: {reason}; see")


def test_the_heads_make_their_runs_under_one_parent(cluster: Cluster, tmp_path: Path) -> None:
    import mlflow

    job = cluster.submit("heads.sh", "train.max_steps=3", sbatch=("--array=0,2",))
    assert [cluster.end(f"{job}_{k}") for k in (0, 2)] == ["COMPLETED"] * 2, cluster.text()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("chaos").experiment_id])
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert parent.info.run_name == "heads 0, 1, 2, 3, 4, 5, 6, 7, 8 (1 seed)"
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    heads = {(r.data.params["model.heads"], r.data.params["loss.fcn"]) for r in children}
    assert len(children) == 2 and heads == {("0", "none"), ("2", "affinity")}
    assert "several nodes write sqlite:" in cluster.text()


def test_cancelled_then_submitted_again_and_signalled_while_it_starts(
    cluster: Cluster, people: ShardSet, tmp_path: Path
) -> None:
    """A backbone on two ranks, as Slurm gives two GPUs; shards by way of the node's storage."""

    def submit(**programs: str) -> str:
        return cluster.submit("msceleb.sh", *IDENTITY, "tracking.enabled=false",
                              sbatch=("--gpus-per-node=2",), DAN_NPROC="",
                              DAN_CACHE=str(tmp_path / "cache"),
                              DAN_DATA=str(people.root), **programs)  # fmt: skip

    def restarts(job: str) -> str:
        return query("scontrol", "show", "job", "-o", job).split("Restarts=")[1].split()[0]

    run = tmp_path / "runs" / "msceleb"
    job = submit(**REAL_AGENTS)
    wait_for(lambda: "step 5 " in cluster.text(), 120)
    query("scancel", job)
    assert "2 ranks on 1 node" in cluster.text()
    assert cluster.end(job) == "CANCELLED" and restarts(job) == "0"
    found = outcome(run)
    assert found["status"] == "preempted"
    saved, *_ = steps_saved(run)
    assert saved == step_path(run, found["step"])
    assert (tmp_path / "cache").is_dir() and "back into the queue" not in cluster.text()

    again = submit(DAN_PYTHON=sys.executable)  # whose ranks import, and are deaf, for seconds
    logs = run / "logs" / f"msceleb-{again}-node0"
    wait_for(lambda: bool([*logs.rglob("1/stdout.log")]), 120)  # workers start, and are deaf yet
    query("scancel", "--batch", "--signal=USR1", again)
    wait_for(lambda: restarts(again) == "1", 60)
    assert cluster.state(job) == "CANCELLED"
    assert cluster.end(again) == "COMPLETED", cluster.text()
    assert (run / BACKBONE).is_file()
    assert outcome(run)["status"] == "finished" and not [*run.glob("stop.*")]
    assert f"resumed after step {found['step']}" in cluster.text()


def test_failures_end_the_job_and_stay_out_of_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "runs" / "rafdb").mkdir(parents=True)
    stale = '{"status": "preempted", "step": 3}'  # of an earlier job
    (tmp_path / "runs" / "rafdb" / "outcome.json").write_text(stale)
    wrong = cluster.submit("rafdb.sh", "train.epoch=1")
    sick = cluster.submit("sfew.sh", DAN_DEVICE="cuda")
    assert cluster.end(wrong) == cluster.end(sick) == "FAILED"
    assert "unknown key 'train.epoch'" in cluster.text()
    assert "error: torch finds no GPU" in cluster.text()
    assert re.search(r"error: node node[12] failed its check", cluster.text())
    for job in (wrong, sick):
        assert "Restarts=0" in query("scontrol", "show", "job", "-o", job)
    assert not steps_saved(tmp_path / "runs" / "sfew")


def test_packing_in_an_array_and_merging_after_it(cluster: Cluster, tmp_path: Path) -> None:
    bare = subprocess.run(["bash", REPOSITORY / "slurm" / "pack.sh"], capture_output=True)
    assert bare.returncode == 2 and bare.stderr.startswith(b"usage: sbatch slurm/pack.sh")
    source = tmp_path / "tree"
    layouts.write_folder(source, {"train": 32, "val": 16}, size=32, seed=0)
    out = str(tmp_path / "packed")
    job = cluster.submit("pack.sh", "folder", "--source", str(source), "--size", "32",
                         "--shard-size", "3", "--workers", "1", "--out", out,
                         sbatch=("--array=1-3",))  # fmt: skip
    merged = cluster.submit("pack.sh", "merge", "--out", out,
                            sbatch=(f"--dependency=afterok:{job}", "--array=1"))  # fmt: skip
    assert cluster.end(f"{merged}_1") == "COMPLETED", cluster.text()
    assert sum(open_shardset(out).counts["train"]) == 32
