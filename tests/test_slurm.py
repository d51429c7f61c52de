"""The shipped Slurm scripts, submitted to a real Slurm of two nodes on this machine."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from chaos import CONFIG, DAN, IDENTITY
from test_train import largest_difference, weights

from conftest import REPOSITORY, train
from dan_dist.model.backbone import BACKBONE
from dan_dist.run.folder import step_path, steps_saved
from shards.format import ShardSet, open_shardset

NODES, CPUS, GPUS = 2, 64, 8
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in DAEMONS if not shutil.which(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING) or os.geteuid() != 0,
    reason=f"needs root and Slurm (apt-get install slurm-wlm munge); missing: {MISSING}",
)
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={root}/munge.run/socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=600
InactiveLimit=0
JobRequeue=1
MailProg=/bin/true
SwitchType=switch/none
GresTypes=gpu
"""


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports, the first two of which are free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return min(port, 65535 - count)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """A cluster of two nodes with eight GPUs each, which are clones of /dev/null."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)
    for name in ("state", "munge", "munge.run", "dev", "spool/node1", "spool/node2"):
        (root / name).mkdir(parents=True)
    (root / "munge").chmod(0o700)
    (root / "munge" / "key").write_bytes(os.urandom(128))
    (root / "munge" / "key").chmod(0o400)
    host, port = socket.gethostname().split(".")[0], free_ports(NODES + 1)
    conf = SLURM_CONF.format(host=host, port=port, root=root)
    for number in range(1, NODES + 1):
        conf += (
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} "
            f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 "
            f"RealMemory=1000000 Gres=gpu:{GPUS} State=UNKNOWN\n"
        )
    conf += "PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP\n"
    (root / "slurm.conf").write_text(conf)
    for number in range(GPUS):
        subprocess.run(["mknod", root / "dev" / f"gpu{number}", "c", "1", "3"], check=True)
    (root / "gres.conf").write_text(
        f"NodeName=node[1-2] Name=gpu File={root}/dev/gpu[0-{GPUS - 1}]\n"
    )
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(root / "slurm.conf")
    try:
        munge = root / "munge.run"
        subprocess.run(
            ["munged", "--force", f"--key-file={root}/munge/key", f"--socket={munge}/socket",
             f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
            check=True,
        )  # fmt: skip
        subprocess.run(["slurmctld"], check=True)
        for number in range(1, NODES + 1):
            subprocess.run(["slurmd", "-N", f"node{number}"], check=True)
        wait_for(lambda: query("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * NODES, 60)
        yield root
    finally:
        query("scancel", "--user=root")
        pids = [*root.glob("slurmd.*.pid"), root / "slurmctld.pid", root / "munge.run" / "pid"]
        for path in pids:
            if path.is_file():
                pid = int(path.read_text())
                os.kill(pid, signal.SIGTERM)
                end = time.monotonic() + 10
                while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
                    time.sleep(0.1)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        shutil.rmtree(root, ignore_errors=True)


def query(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)


class Cluster:
    """Submits scripts from a working folder, and waits for jobs."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder = folder
        self.config = folder / "tiny.yaml"
        self.config.write_text(CONFIG.format(shards=shards, output=folder / "unused"))
        self.environment = {
            **os.environ, "DAN_REPOSITORY": str(REPOSITORY), "DAN_PYTHON": sys.executable,
            "DAN_CONFIG": str(self.config), "DAN_NPROC": "1", "DAN_DEVICE": "cpu",
            "DAN_DATA": str(shards), "PYTHONPATH": str(REPOSITORY),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }  # fmt: skip

    def submit(
        self, script: str, *options: str, sbatch: tuple[str, ...] = (), **change: str
    ) -> str:
        path = str(REPOSITORY / "slurm" / script)
        done = subprocess.run(
            ["sbatch", "--parsable", *sbatch, path, *options], cwd=self.folder, text=True,
            capture_output=True, env={**self.environment, **change},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        shown = query("scontrol", "show", "job", "-o", job)
        return shown.split("JobState=")[1].split()[0]

    def end(self, job: str, timeout_s: float = 150) -> str:
        """Waits for a job's end; returns its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.state(job) in over, timeout_s)
        return self.state(job)

    def said(self) -> str:
        """All that the jobs have written."""
        logs = [*self.folder.glob("*.out"), *self.folder.rglob("logs/*.log")]
        return "\n".join(path.read_text() for path in sorted(logs))


@pytest.fixture
def cluster(slurm: Path, faces: ShardSet, tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, faces.root)


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def test_two_nodes_preempted_and_requeued_end_as_if_nothing_was(
    cluster: Cluster, tmp_path: Path
) -> None:
    options = [*DAN, "optim.lr=1e-3", "train.max_steps=20", "tracking.enabled=false"]
    job = cluster.submit("affectnet8.sh", *options, sbatch=("--nodes=2",))
    run = tmp_path / "runs" / "affectnet8"
    wait_for(lambda: "step 8 " in cluster.said(), 120)
    query("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    config = tmp_path / "reference.yaml"
    config.write_text(cluster.config.read_text().replace("unused", "reference"))
    train(2, config, *options, cwd=tmp_path)
    wait_for(lambda: "Restarts=1" in query("scontrol", "show", "job", "-o", job), 60)
    assert cluster.end(job) == "COMPLETED", cluster.said()
    said = cluster.said()
    assert "SIGUSR1: stopped after a checkpoint" in said and "back into the queue" in said
    assert "resumed after step" in said and outcome(run)["status"] == "finished"
    for node in (0, 1):
        log = run / "logs" / f"affectnet8-{job}-node{node}"
        assert log.with_suffix(".log").is_file()
        attempts = sorted(p.parent.parent.parent.name[:-9] for p in log.rglob("0/stdout.log"))
        assert attempts == [f"{job}.0", f"{job}.1"]
    assert largest_difference(weights(run), weights(tmp_path / "reference")) == 0


def test_the_heads_make_their_runs_under_one_parent(cluster: Cluster, tmp_path: Path) -> None:
    import mlflow

    job = cluster.submit("heads.sh", "train.max_steps=3", sbatch=("--array=0,2",))
    assert [cluster.end(f"{job}_{k}") for k in (0, 2)] == ["COMPLETED"] * 2, cluster.said()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("chaos").experiment_id])
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert re.fullmatch(r"heads-\w+", parent.info.run_name)
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    heads = {(r.data.params["model.heads"], r.data.params["loss.fcn"]) for r in children}
    assert len(children) == 2 and heads == {("0", "none"), ("2", "affinity")}
    assert "several nodes write sqlite:" in cluster.said()


def test_cancelled_then_submitted_again_and_signalled_while_it_starts(
    cluster: Cluster, people: ShardSet, tmp_path: Path
) -> None:
    """A backbone on two ranks, as Slurm gives two GPUs; shards by way of the node's storage."""

    def submit() -> str:
        return cluster.submit("msceleb.sh", *IDENTITY, "tracking.enabled=false",
                              sbatch=("--gpus-per-node=2",), DAN_NPROC="",
                              DAN_CACHE=str(tmp_path / "cache"),
                              DAN_DATA=str(people.root))  # fmt: skip

    def restarts(job: str) -> str:
        return query("scontrol", "show", "job", "-o", job).split("Restarts=")[1].split()[0]

    run = tmp_path / "runs" / "msceleb"
    job = submit()
    wait_for(lambda: "step 5 " in cluster.said(), 120)
    query("scancel", job)
    assert cluster.end(job) == "CANCELLED" and restarts(job) == "0"
    found = outcome(run)
    assert found["status"] == "preempted"
    saved, *_ = steps_saved(run)
    assert saved == step_path(run, found["step"])
    assert (tmp_path / "cache").is_dir() and "back into the queue" not in cluster.said()

    again = submit()
    logs = run / "logs" / f"msceleb-{again}-node0"
    wait_for(lambda: bool([*logs.rglob("1/stdout.log")]), 120)  # workers start, and are deaf yet
    query("scancel", "--batch", "--signal=USR1", again)
    wait_for(lambda: restarts(again) == "1", 60)
    assert cluster.state(job) == "CANCELLED"
    assert cluster.end(again) == "COMPLETED", cluster.said()
    assert (run / BACKBONE).is_file()
    assert outcome(run)["status"] == "finished" and not [*run.glob("stop.*")]
    assert f"resumed after step {found['step']}" in cluster.said()


NO_SLURM = """
source "$DAN_REPOSITORY/slurm/_env.sh"
scontrol() { echo "scontrol $*"; }
srun() { case "$*" in
    *torch.distributed.run*) trap "" USR1; echo trains; TRAINING ;;
    *) CHECK ;;
esac; }
dan_train config.yaml out
"""


@pytest.mark.parametrize(
    ("check", "training", "requeued", "code"),
    [
        ("kill -USR1 $$", "exit 3", True, 0),  # nothing is started any more
        ("kill -TERM $$", "exit 3", False, 1),
        (":", "END finished; kill -USR1 $$; sleep 0.3", False, 0),
        (":", "END preempted; kill -USR1 $$; sleep 0.3", True, 0),
        (":", "END preempted; kill -TERM $$; sleep 0.3", False, 1),
        (":", "END preempted", False, 1),
        (":", "END failed; kill -USR1 $$; sleep 0.3; exit 2", False, 2),
        (":", "kill -USR1 $$; sleep 0.3; exit 1", True, 0),  # gone before it could say anything
        (":", "exit 4", False, 4),
    ],
)
def test_what_becomes_of_a_job(
    tmp_path: Path, check: str, training: str, requeued: bool, code: int
) -> None:
    """The scripts' part of it, without Slurm: `$$` is the batch script."""
    training = re.sub(r"END (\w+)", r"""echo '{"status": "\1"}' >out/outcome.json""", training)
    script = NO_SLURM.replace("TRAINING", training).replace("CHECK", check)
    variables = {"DAN_REPOSITORY": str(REPOSITORY), "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
                 "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n1"}  # fmt: skip
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, **variables})  # fmt: skip
    assert done.returncode == code, done
    assert ("scontrol requeue 7" in done.stdout) == requeued, done
    assert ("trains" in done.stdout) == (check == ":"), done
    assert not [*(tmp_path / "out").glob("stop.*")]


@pytest.mark.parametrize(
    ("gpus", "line"), [(0, "torch finds no GPU"), (7, "torch finds 7 GPUs, Slurm gives 8"),
                       (8, "GPU 0: ")],
)  # fmt: skip
def test_a_node_without_all_its_gpus_is_sick(
    gpus: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if gpus and torch.cuda.is_available():
        pytest.skip("here GPUs are real")
    health = runpy.run_path(str(REPOSITORY / "slurm" / "health.py"))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert health["main"]("cuda") == 1
    assert line in capsys.readouterr().err


def test_failures_end_the_job_and_stay_out_of_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "runs" / "rafdb").mkdir(parents=True)
    stale = '{"status": "preempted", "step": 3}'  # of an earlier job
    (tmp_path / "runs" / "rafdb" / "outcome.json").write_text(stale)
    wrong = cluster.submit("rafdb.sh", "train.epoch=1")
    sick = cluster.submit("sfew.sh", DAN_DEVICE="cuda")
    assert cluster.end(wrong) == cluster.end(sick) == "FAILED"
    assert "unknown key 'train.epoch'" in cluster.said()
    assert "error: torch finds no GPU" in cluster.said()
    assert re.search(r"error: node node[12] failed its check", cluster.said())
    for job in (wrong, sick):
        assert "Restarts=0" in query("scontrol", "show", "job", "-o", job)
    assert not steps_saved(tmp_path / "runs" / "sfew")


def test_packing_in_an_array_and_merging_after_it(cluster: Cluster, tmp_path: Path) -> None:
    bare = subprocess.run(["bash", REPOSITORY / "slurm" / "pack.sh"], capture_output=True)
    assert bare.returncode == 2 and bare.stderr.startswith(b"usage: sbatch slurm/pack.sh")
    source = tmp_path / "tree"
    import layouts

    layouts.write_folder(source, {"train": 32, "val": 16}, size=32, seed=0)
    out = str(tmp_path / "packed")
    job = cluster.submit("pack.sh", "folder", "--source", str(source), "--size", "32",
                         "--shard-size", "3", "--workers", "1", "--out", out,
                         sbatch=("--array=1-3",))  # fmt: skip
    merged = cluster.submit("pack.sh", "merge", "--out", out,
                            sbatch=(f"--dependency=afterok:{job}", "--array=1"))  # fmt: skip
    assert cluster.end(f"{merged}_1") == "COMPLETED", cluster.said()
    assert sum(open_shardset(out).counts["train"]) == 32
