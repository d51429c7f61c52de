"""A real Slurm of two nodes on this machine, and what the tests do with it."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos_runs import CONFIG
from interpreter import python
from ranks import free_port

from conftest import REPOSITORY

NODES, CPUS, GPUS = 2, 64, 8
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in DAEMONS if not shutil.which(name)]
SLURM_CONF = """
ClusterName=test
FirstJobId={first_job}
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


@contextmanager
def slurm() -> Iterator[None]:
    """A cluster of two nodes with eight GPUs each, which are clones of /dev/null."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)
    write_files(root)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(root / "slurm.conf")
    try:
        start_daemons(root)
        yield
    finally:
        query("scancel", "--user=root")
        stop_daemons(root)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        shutil.rmtree(root, ignore_errors=True)


def write_files(root: Path) -> None:
    """Configuration, key and devices of the cluster."""
    for name in ("state", "munge", "munge.run", "dev", "spool/node1", "spool/node2"):
        (root / name).mkdir(parents=True)
    (root / "munge").chmod(0o700)
    (root / "munge" / "key").write_bytes(os.urandom(128))
    (root / "munge" / "key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    port = min(free_port(), 65535 - NODES - 1)  # of neighbouring ones, the first of which is free
    # The number of a job names its rendezvous: another cluster on this machine has others.
    first_job = random.randrange(1, 10_000) * 100
    conf = SLURM_CONF.format(host=host, port=port, root=root, first_job=first_job)
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


def start_daemons(root: Path) -> None:
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


def stop_daemons(root: Path) -> None:
    pids = [*root.glob("slurmd.*.pid"), root / "slurmctld.pid", root / "munge.run" / "pid"]
    for path in filter(Path.is_file, pids):
        pid = int(path.read_text())
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.1)


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
        self.config.write_text(CONFIG.format(shards=shards, output=folder / "unused", epochs=6))
        self.environment = {
            **os.environ, "DAN_REPOSITORY": str(REPOSITORY), "DAN_PYTHON": python(),
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

    def text(self) -> str:
        """All that the jobs have written."""
        logs = [*self.folder.glob("*.out"), *self.folder.rglob("logs/*.log")]
        return "\n".join(path.read_text() for path in sorted(logs))
