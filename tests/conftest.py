"""Small real shards and small real trainings that several tests share."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import interpreter
import psutil
import pytest
from interpreter import python
from parts import in_parts
from ranks import run_ranks

from dan_dist.run.cli import imports

with imports():
    import torch
    from tracking_server import STORE, TrackingServer, serve
    from trees import packed, tree

    from dan_dist import programs
    from dan_dist import train as story
    from dan_dist.config import layered, load_config
    from dan_dist.distributed.world import World
    from dan_dist.run.folder import newest_checkpoint
    from dan_dist.tracking import tracker as tracking
    from dan_dist.tracking.store import connect
    from shards.files import locked
    from shards.format import ShardSet, open_shardset
    from shards.packing.writer import pack
    from shards.releases import synthetic

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCH = REPOSITORY / "launch"
SCRIPT = str(REPOSITORY / "launch" / "train.py")

# A tiny run of the real story: the baseline network, a sixteenth of its weights, is the quickest;
# DAN turns it to DAN.
TINY = """
data: {{shards: {shards}, sampling: balanced, augment: {{flip_p: 0.5, affine_p: 0.7, degrees: 20,
  scale: [0.8, 1.0], translate: 0.2, erase_p: 0.5}}}}
model: {{image_size: 32, heads: 0, width: 16}}
loss: {{fcn: none, afn: none}}
optim: {{name: sgd, lr: 1e-2, momentum: 0.9}}
schedule: {{gamma: 0.5}}
train: {{epochs: 2, global_batch: 8, output: {output}, device: cpu, log_every: 1}}
tracking: {{enabled: false}}
"""


ALONE = World(0, 0, 1, 1, torch.device("cpu"))
DAN = ["model.heads=2", "loss.fcn=affinity", "loss.afn=partition"]
STEPS = ["optim.name=adam", "optim.lr=1e-3", "train.max_steps=4", "train.precision=float32"]
HALVES = ["train.max_steps=10", "train.checkpoint_every=5"]
IDENTITY = ["task=identity", "data.sampling=shuffle", "data.pairs=60"]


# Two workers share two cores, and OpenMP's threads spin while they wait for each other: with two
# threads in each worker a step took ten times as long.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """One fork server for all workers' commands and ranks."""
    config.add_cleanup(gc.unfreeze)  # else libraries report as leaked what `imports` has frozen
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="interpreter-"))
        os.environ[interpreter.PROGRAM] = str(interpreter.stand_in(folder))
        config.add_cleanup(lambda: (interpreter.stop(folder), shutil.rmtree(folder)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = in_parts(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    gc.freeze()  # the tests' own imports stay, too


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test writes into the working folder, MLflow's `mlruns` for one, goes with it."""
    monkeypatch.chdir(tmp_path)


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of pytest's workers makes, for all of them and the whole session."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with locked(base / f"{name}.lock", f"{name} is being made", wait=True):
        if not (base / f"{name}.made").exists():
            make(base / name)
            (base / f"{name}.made").touch()
    return base / name


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """80 training faces in AffectNet's proportions, 16 balanced for validation, 32 px."""
    release = synthetic.release(80, 16, size=32, seed=7)
    folder = shared(
        tmp_path_factory, "faces", lambda f: pack(release, f, size=32, workers=1, shard_size=20)
    )
    return open_shardset(folder)


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """80 training faces of 16 persons, 60 of 20 others for validation, 32 px."""
    release = synthetic.identity_release(80, 60, identities=16, held_out=20, size=32, seed=7)
    folder = shared(
        tmp_path_factory, "people", lambda f: pack(release, f, size=32, workers=1, shard_size=20)
    )
    return open_shardset(folder)


def trained(factory: pytest.TempPathFactory, name: str, data: ShardSet, options: list[str]) -> Path:
    """The folder of a tracked run that is trained once a session; its store is beside it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        config = folder / "run.yaml"
        config.write_text(TINY.format(shards=data.root, output=folder / "run"))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            patch.chdir(folder)  # the store is there
            assert single(config, *options, "tracking.enabled=true").status == "finished"

    return shared(factory, name, make) / "run"


@pytest.fixture(scope="session")
def dan_run(faces: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DAN of two heads after four steps that tell near images apart; see DAN and STEPS."""
    return trained(tmp_path_factory, "dan", faces, [*DAN, *STEPS])


@pytest.fixture(scope="session")
def baseline_run(faces: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline after ten steps, one epoch, with the checkpoint of step 5; see HALVES."""
    return trained(tmp_path_factory, "baseline", faces, HALVES)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with its tables and nothing in them, which takes seconds to make."""

    def make(folder: Path) -> None:
        folder.mkdir()
        connect(f"sqlite:///{folder}/mlflow.db")

    return shared(tmp_path_factory, "store", make) / "mlflow.db"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store of the test's own, which MLflow is set to."""
    shutil.copy(empty_store, tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def server(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrackingServer]:
    """MLflow's server over an empty store of the test's own, which MLflow is set to."""
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    (tmp_path / "server").mkdir()
    shutil.copy(empty_store, tmp_path / "server" / STORE)
    with serve(tmp_path / "server") as found:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", found.url)
        yield found


def copied(run: Path, folder: Path) -> Path:
    """A run's folder again, for a test that changes it; checkpoints are linked, not copied.

    Checkpoints are only ever replaced by others; whoever writes into one unlinks it first.
    """
    folder.mkdir(parents=True)
    for path in run.iterdir():
        if path.suffix == ".pt":
            os.link(path, folder / path.name)
        elif path.is_file():
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The folder tree `source`, which lies beside it, packed."""
    return packed(tree(tmp_path / "source"), tmp_path / "out")


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


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a command of `start` has started, as torchrun starts ranks."""
    return psutil.Process(interpreter.forked(process.pid)).children()


def run(
    *command: str | Path, cwd: Path, timeout_s: float = 300, interpreter: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project in `cwd`, with a hard time limit and nothing left behind.

    interpreter: in place of `sys.executable`; by default `python()`.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [interpreter or python() if part == sys.executable else str(part) for part in command],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"{command} took more than {timeout_s} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call_program(program: str, words: list[str]) -> None:
    """Runs a documented program in this process, which ends with it."""
    sys.argv = [program, *words]
    getattr(programs, program)()


def launch(
    program: str, ranks: int, *arguments: str | Path, cwd: Path, timeout_s: float = 300,
    inside: Callable[[str, list[str]], None] = call_program,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """A documented program on `ranks` CPU processes, as torchrun would start it, but forked."""
    words = [str(argument) for argument in arguments]
    if program == "train":  # a test adds to what it has in common with others
        words = layered(words)
    found = run_ranks(ranks, inside, program, words, cwd=cwd, timeout_s=timeout_s)
    out, err = (
        "".join(texts) for texts in zip(*((e.stdout, e.stderr) for e in found), strict=True)
    )
    codes = [ended.code for ended in found]
    return subprocess.CompletedProcess([program, *words], codes[0] or max(codes), out, err)


def train(ranks: int, *arguments: str | Path, cwd: Path, timeout_s: float = 300) -> str:
    """Trains on `ranks` CPU processes; returns what they printed."""
    done = launch("train", ranks, *arguments, cwd=cwd, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(ranks: int) -> list[str]:
    """The documented start of so many ranks, to be followed by a program."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*agent, f"--nproc-per-node={ranks}"]


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The project's own lines about what is wrong."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def single(config: Path, *overrides: str) -> story.RunResult:
    return story.main(load_config(config, layered(overrides)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, centres, statistics and optimiser state of a run's newest checkpoint."""
    found = newest_checkpoint(folder)
    assert found is not None
    content = found[1]
    moments = content["optimizer"]["state"]
    flat = {f"{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
    return {**content["objective"], **{k: v for k, v in flat.items() if torch.is_tensor(v)}}


def largest_difference(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], only: str = ""
) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a if k.endswith(only))


def outcome(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_bytes())


def history(uri: str, key: str = "train/loss") -> list[tuple[int, float]]:
    """The points of the one run that MLflow holds."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("dan_dist").experiment_id])
    return [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, key)]


def start(*command: str | Path, cwd: Path, interpreter: str | None = None) -> subprocess.Popen[str]:
    """Starts Python with these words; interpreter: in place of `python()`."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [interpreter or python(), *map(str, command)], cwd=cwd, env=environment, text=True,
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
