"""Trainings that lose processes and nodes, and end as if nothing had happened."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import free_port

from conftest import REPOSITORY, SCRIPT, children, outcome, run, start

Write = Callable[[str], Path]
pytestmark = pytest.mark.slow

BOTH = "2 ranks on 2 nodes"  # a training with all of them begins with it


def test_chaos_in_short(tmp_path: Path) -> None:
    """The command: every kind of spoiled input, and some of the trainings' faults, in any task."""
    task = random.choice(("baseline", "expression", "identity"))
    kinds = ("images,packing,shards,configurations,checkpoints,resumes,servers,full_disks,states,"
             "sigkill_rank,sigkill_all,sigusr1,corrupt_checkpoint,truncate_shard")  # fmt: skip
    done = run(sys.executable, REPOSITORY / "tests" / "chaos.py", "--faults", "18", "--kinds",
               kinds, "--task", task, "--minutes", "2", cwd=tmp_path, timeout_s=500,
               interpreter=sys.executable)  # it kills torchrun and ranks  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tried, held = re.findall(r"\| all \| (\d+) \| (\d+) \|", done.stdout)[0]
    assert tried == held and int(tried) > 10, done.stdout


def test_programs_end_beside_a_load(tmp_path: Path) -> None:
    done = run(sys.executable, REPOSITORY / "tests" / "standing.py", "--times", "1", "--load", "1",
               "--programs", "predict", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| predict | 1 |" in done.stdout and "0 of them stood still" in done.stdout


@pytest.mark.parametrize("victim", ["worker", "node", "node that comes back"])
def test_an_elastic_job_goes_on_without_the_dead(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Two nodes of one rank each under torchrun's own restarts."""
    # Without it a node that joins a later round waits for an address that nobody writes.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    port = free_port()
    options = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1",
               "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=job", "--local-addr",
               "127.0.0.1", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf",
               "last_call_timeout=5,join_timeout=60", SCRIPT, tiny("run"), "train.epochs=4",
               "train.checkpoint_every=3"]  # fmt: skip
    nodes, texts, readers = [], [], []

    def join() -> None:
        """Starts a node; rank 0 prints, on whichever node it is."""
        nodes.append(start(*options, cwd=tmp_path))
        texts.append("")
        readers.append(threading.Thread(target=follow, args=(nodes[-1], texts, len(texts) - 1)))
        readers[-1].start()

    try:
        join()
        until(lambda: listens(port), texts)  # the first node holds the rendezvous, and stays
        join()
        until(lambda: "step 8 " in "".join(texts), texts)
        workers = children(nodes[1])
        for process in workers[:1] if victim == "worker" else [nodes[1], *workers]:
            process.kill()
        if victim == "node that comes back":
            before = "".join(texts).count(BOTH)
            join()
            until(lambda: "".join(texts).count(BOTH) > before, texts)
        nodes[0].wait(150)
        for reader in readers:
            reader.join(10)
        printed = "".join(texts)
        assert "resumed after step" in printed and "finished after 40 steps" in printed, printed
        assert outcome(tmp_path / "run")["status"] == "finished"
        assert nodes[0].returncode == 0, printed
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(is_there: Callable[[], bool], texts: list[str]) -> None:
    """Waits for something of the nodes, whose words are shown if it does not come."""
    deadline_s = time.monotonic() + 90
    while not is_there() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert is_there(), "".join(texts)


def follow(process: subprocess.Popen[str], texts: list[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        texts[number] += line
