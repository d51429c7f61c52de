"""The batch scripts without a Slurm: what becomes of a job, sick nodes, their usage."""

import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY

NO_SLURM = """
source "$DAN_REPOSITORY/slurm/_env.sh"
scontrol() { echo "scontrol $*"; }
srun() { case "$*" in
    *torch.distributed.run*) trap "" USR1; echo trains; TRAINING ;;
    *) CHECK ;;
esac; }
dan_train config.yaml WORDS
"""


@pytest.mark.parametrize("words", ["out", "former seed=1 train.output=first train.output=out a=b"])
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
    tmp_path: Path, check: str, training: str, requeued: bool, code: int, words: str
) -> None:
    """The scripts' part of it, without Slurm: `$$` is the batch script.

    It is about the folder that the run has, by the last train.output; others are left as they are.
    """
    (tmp_path / "former").mkdir()
    for name in ("outcome.json", "stop.3.0"):
        (tmp_path / "former" / name).write_text('{"status": "finished"}')
    training = re.sub(r"END (\w+)", r"""echo '{"status": "\1"}' >out/outcome.json""", training)
    script = NO_SLURM.replace("TRAINING", training).replace("CHECK", check)
    script = script.replace("WORDS", words)
    variables = {"DAN_REPOSITORY": str(REPOSITORY), "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
                 "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n1"}  # fmt: skip
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, **variables})  # fmt: skip
    assert done.returncode == code, done
    assert ("scontrol requeue 7" in done.stdout) == requeued, done
    assert ("trains" in done.stdout) == (check == ":"), done
    assert not [*(tmp_path / "out").glob("stop.*")]
    assert len([*(tmp_path / "former").iterdir()]) == 2 and not (tmp_path / "first").exists()


@pytest.mark.parametrize("word", ["train.output=", "train.output='a b'", 'train.output="a"',
                                  "train.output=~/a", "train.output=$HOME/a", "train.output=a/$B",
                                  "train={output: a}"])  # fmt: skip
def test_a_folder_that_only_the_training_would_find_is_refused(tmp_path: Path, word: str) -> None:
    script = NO_SLURM.replace("TRAINING", ":").replace("CHECK", ":").replace("WORDS", 'out "$WORD"')
    variables = {"DAN_REPOSITORY": str(REPOSITORY), "SLURM_JOB_ID": "7", "WORD": word}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, **variables})  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    expected = f"error: {word}: expected train.output=FOLDER, without quotes, ~ or $\n"
    assert done.stderr == expected and not [*tmp_path.iterdir()]


EXECUTES = """
source "$DAN_REPOSITORY/slurm/_env.sh"
scontrol() { echo "NodeAddr=n1 "; }
srun() { while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 "$@"; }
dan_train config.yaml out optim.lr=1 || true
"""
CONTAINER = """#!/bin/bash
printf '<%s>' "$@" >>"$LOG"; echo >>"$LOG"
"""


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("apptainer exec -B '/a b' x.sif python", ["exec", "-B", "/a b", "x.sif", "python"]),
        ("apptainer  $(touch evaluated) `touch evaluated` ; $HOME *",
         ["$(touch", "evaluated)", "`touch", "evaluated`", ";", "$HOME", "*"]),
        ("spaced python", []), ("./spaced python", []), ("TMP/spaced python", []),
    ],
)  # fmt: skip
def test_the_python_of_a_job_may_be_a_command_of_several_words(
    python: str, words: list[str], tmp_path: Path
) -> None:
    """Nothing in it is evaluated; a program whose path has spaces is one word."""
    for name in ("apptainer", "spaced python"):
        (tmp_path / name).write_text(CONTAINER)
        (tmp_path / name).chmod(0o755)
    variables = {"DAN_REPOSITORY": str(REPOSITORY), "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
                 "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n1", "LOG": f"{tmp_path}/log",
                 "DAN_PYTHON": python.replace("TMP", str(tmp_path)), "HOME": "/elsewhere",
                 "PATH": f"{tmp_path}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", EXECUTES], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, **variables})  # fmt: skip
    assert not (tmp_path / "evaluated").exists()
    lines = (tmp_path / "log").read_text().splitlines()
    found = [line[1:-1].split("><") for line in lines]
    assert found[0] == [*words, f"{REPOSITORY}/slurm/health.py", "cuda"], done
    assert found[1][: len(words) + 4] == [
        *words, "-m", "torch.distributed.run", "--log-dir=out/logs/x-7-node0", "--tee=3",
    ]  # fmt: skip
    assert found[1][-4:] == ["config.yaml", "train.output=out", "train.device=cuda", "optim.lr=1"]


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (r'{"status": "failed", "step": null, "reason": "no \"x\" in a.yaml", "time_s": 1.5}',
         'error: the run ended as failed: no "x" in a.yaml; see out/logs'),
        (r'{"status": "failed", "step": 3, "reason": "heads \u2014 \"≤ 8\" für \\\"größer\\",'
         ' "time_s": 1}',
         r'error: the run ended as failed: heads \u2014 "≤ 8" für \"größer\; see out/logs'),
        ('{"status": "preempted", "step": 4, "reason": "SIGTERM: stopped", "time_s": 1.5}',
         "error: the run ended as preempted: SIGTERM: stopped; see out/logs"),
        ("", "error: the run ended as failed: no outcome was left (exit code 3): it was killed; "
         "see out/logs"),
    ],
)  # fmt: skip
def test_the_reason_is_the_jobs_last_line(tmp_path: Path, outcome: str, line: str) -> None:
    """And rank 0's lines are the job's own, whatever the other ranks and torchrun print."""
    training = "printf '[rank 0]: step 1\n[rank 1]: rank 1: odd\n[rank 0]: error: x\nW torchrun\n'"
    script = f"""
        source "$DAN_REPOSITORY/slurm/_env.sh"
        scontrol() {{ :; }}
        python() {{ {training}; [ -z '{outcome}' ] || echo '{outcome}' >out/outcome.json; exit 3; }}
        export -f python
        srun() {{ case "$*" in
            *torch.distributed.run*) SLURM_NODEID=1; export SLURM_NODEID
                while [ "$1" != bash ]; do shift; done; "$@" ;;
        esac; }}
        dan_train config.yaml out"""
    variables = {"DAN_REPOSITORY": str(REPOSITORY), "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
                 "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n1"}  # fmt: skip
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, **variables})  # fmt: skip
    assert done.returncode == 3, done
    assert done.stdout == "step 1\nerror: x\n"
    assert done.stderr.splitlines()[-1] == line
    log = (tmp_path / "out" / "logs" / "x-7-node1.log").read_text()
    assert len(log.splitlines()) == 4 and "[rank 1]: rank 1: odd" in log


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
