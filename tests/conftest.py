"""Small real shards and small real trainings that several tests share."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dan_dist import train as story
from dan_dist.config import load_config
from shards.format import ShardSet, open_shardset
from shards.releases import synthetic
from shards.packing.writer import pack

pytest_plugins = ("trained",)

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = str(REPOSITORY / "launch" / "train.py")

# A tiny run of the real story: the baseline network, which is the quickest; DAN turns it to DAN.
TINY = """
data: {{shards: {shards}, sampling: balanced, augment: {{flip_p: 0.5, affine_p: 0.7, degrees: 20,
  scale: [0.8, 1.0], translate: 0.2, erase_p: 0.5}}}}
model: {{image_size: 32, heads: 0}}
loss: {{fcn: none, afn: none}}
optim: {{name: sgd, lr: 1e-2, momentum: 0.9}}
schedule: {{gamma: 0.5}}
train: {{epochs: 2, global_batch: 8, output: {output}, device: cpu, log_every: 1}}
tracking: {{enabled: false}}
"""


DAN = ["model.heads=2", "loss.fcn=affinity", "loss.afn=partition"]
IDENTITY = ["task=identity", "data.sampling=shuffle", "data.pairs=60"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test writes into the working folder, MLflow's `mlruns` for one, goes with it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """80 training faces in AffectNet's proportions, 16 balanced for validation, 32 px."""
    folder = tmp_path_factory.mktemp("faces") / "shards"
    release = synthetic.release(80, 16, size=32, seed=7)
    pack(release, folder, size=32, workers=1, shard_size=20)
    return open_shardset(folder)


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """80 training faces of 16 persons, 60 of 20 others for validation, 32 px."""
    folder = tmp_path_factory.mktemp("people") / "shards"
    release = synthetic.identity_release(80, 60, identities=16, held_out=20, size=32, seed=7)
    pack(release, folder, size=32, workers=1, shard_size=20)
    return open_shardset(folder)


@pytest.fixture
def task(request: pytest.FixtureRequest, people: ShardSet) -> list[str]:
    """The options that make the tiny run one on identities, where the parameter says so."""
    return [*IDENTITY, f"data.shards={people.root}"] if request.param == "identity" else []


@pytest.fixture
def tiny(faces: ShardSet, tmp_path: Path) -> Callable[[str], Path]:
    """Writes a tiny configuration whose output is `tmp_path`/NAME; returns its path."""

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(TINY.format(shards=faces.root, output=tmp_path / name))
        return path

    return write


def damaged_scans(jpeg: bytes) -> dict[str, bytes]:
    """A JPEG with its image data spoilt in ways that most decoders pass over in silence."""
    half = jpeg[: len(jpeg) // 2]
    noise = random.Random(0).randbytes(len(half)).replace(b"\xff", b"\xfe")
    table = jpeg.index(b"\xff\xdb")
    end = table + 2 + int.from_bytes(jpeg[table + 2 : table + 4], "big")
    return {
        "cut": half + b"\xff\xd9",
        "zeros": half + bytes(len(half)) + b"\xff\xd9",
        "noise": half + noise + b"\xff\xd9",
        "no scan": jpeg[: jpeg.index(b"\xff\xda") + 14] + b"\xff\xd9",
        "no table": jpeg[:table] + jpeg[end:],
    }


def run(
    *command: str | Path, cwd: Path, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project in `cwd`, with a hard time limit and nothing left behind."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"{command} took more than {timeout_s} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(ranks: int, *arguments: str | Path, cwd: Path, timeout_s: float = 240) -> str:
    """Trains on `ranks` CPU processes by the documented command; returns what it printed."""
    script = REPOSITORY / "launch" / "train.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    done = run(*command, script, *arguments, cwd=cwd, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def single(config: Path, *overrides: str) -> story.RunResult:
    return story.main(load_config(config, overrides))


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def history(uri: str, key: str = "train/loss") -> list[tuple[int, float]]:
    """The points of the one run that MLflow holds."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("dan_dist").experiment_id])
    return [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, key)]


def start(*command: str | Path, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], words: str, timeout_s: float = 90) -> str:
    """Reads what a process prints up to a line with `words`."""
    assert process.stdout is not None
    seen, timer = "", threading.Timer(timeout_s, process.kill)
    timer.start()
    for line in process.stdout:
        seen += line
        if words in line:
            timer.cancel()
            return seen
    timer.cancel()
    raise AssertionError(f"'{words}' was not said:\n{seen}")
