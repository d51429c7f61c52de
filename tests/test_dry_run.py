"""A dry run finds what a training would end with, and leaves nothing behind."""

import logging
import re
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch

from conftest import DAN, IDENTITY, REPOSITORY, run, single
from dan_dist import config as configuration
from dan_dist import dry_run, room
from dan_dist.config import layered, load_config, to_yaml
from dan_dist.dry_run import check
from shards.files import locked
from shards.format import ShardSet

Write = Callable[[str], Path]
FACES = ["data.synthetic.train=64", "data.synthetic.val=8", "data.synthetic.size=32",
         "model.image_size=32", "train.global_batch=16", "train.device=cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    caplog.set_level(logging.INFO)


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.slow
def test_the_command_prints_a_configuration_that_is_the_same(tmp_path: Path) -> None:
    """All of its output is YAML: what was found stands in it as comments."""
    script = REPOSITORY / "launch" / "train.py"
    done = run(sys.executable, script, "demo", *FACES, "--dry-run", "--ranks", "6", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert list(tmp_path.iterdir()) == []
    comments = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    for expected in (
        ", 6 ranks on 1 node, ", "output: runs/demo; tracking: MLflow, sqlite:///",
        "data.shards data/demo: not there yet; the training draws the faces",
        "data: synthetic (seed 0, 32 px), 64 images of 8 classes, 8 to evaluate on",
        "batch: 16 images, 2 or 3 on each rank", "steps: 4 an epoch, 8 in all",
        "disk: at most ",
        "backbone: random start", "no checkpoint in runs/demo: a new run",
        f"MLflow: the training makes {tmp_path}/mlflow.db", "all checks passed; the configuration:",
    ):  # fmt: skip
        assert any(expected in line for line in comments), expected
    written = tmp_path / "resolved.yaml"
    written.write_text(done.stdout)
    assert load_config(written) == load_config("demo", FACES)


BAD: dict[str, tuple[list[str], str]] = {
    "no shards": (["data.shards=/nowhere"], r"/nowhere/manifest\.json not found"),
    "class count": (["data.classes=[a, b]"], r"data\.classes has 2 classes .* has 8 \(neutral, h"),
    "batch too large": (["train.global_batch=81"], r"80 training images, fewer than .* \(81\)"),
    "no such split": (["data.val_split=test"], r"no split 'test', it has train, val"),
    "no backbone": (["model.backbone=/no.pth"], r"/no\.pth: no such file; give the path"),
    "no weights": (["model.weights=/no.pth"], r"model\.weights /no\.pth: no such checkpoint"),
    "too many ranks": (["train.global_batch=4"], r"5 ranks, more than train\.global_batch \(4\)"),
    "BatchNorm of one": (["train.global_batch=5", "model.sync_bn=false"], "BatchNorm 1 images"),
    "unwritable": (["train.output=/proc/run"], r"train\.output /proc/run cannot be written"),
    "remote, no cache": (["data.shards=https://x/y"], r"is remote: set data\.cache to a local"),
    "unwritable cache": (["data.cache=/proc/c"], r"data\.cache /proc/c cannot be written"),
    "synthetic elsewhere": (
        ["data.synthetic={train: 8, val: 8, size: 32}"],
        r"not the faces asked for .* name another folder",
    ),
    "DeepSpeed's key": (
        ["engine.name=deepspeed", "engine.deepspeed={train_batch_size: 8}"],
        r"engine\.deepspeed\.train_batch_size: train\.global_batch sets that",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_ends_a_training_ends_a_dry_run(tiny: Write, tmp_path: Path, case: str) -> None:
    overrides, message = BAD[case]
    config = load_config(tiny("run"), overrides)
    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        check(config, 5)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_faces_that_are_not_drawn_yet_are_judged_by_their_list(tmp_path: Path) -> None:
    for overrides, message in (
        (["data.classes=[a, b]"], r"data\.classes has 2 classes \(a, b\), data/demo has 8"),
        (["train.global_batch=65"], r"64 training images, fewer than train\.global_batch"),
        (["data.val_split=test"], r"data/demo: no split 'test', it has train, val"),
        (["data.synthetic.val=9"], "expected a positive multiple of 8"),
        (["data.shards=s3://bucket/x"], "faces cannot be packed into s3://bucket/x"),
        (["data.shards=/proc/faces"], "data.shards /proc/faces cannot be written"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            check(load_config("demo", layered(FACES, overrides)), 1)
    own = ["data.synthetic.train=80", "data.synthetic.val=60", "data.pairs=60",
           "data.synthetic.identities=16", "data.synthetic.held_out=20"]  # fmt: skip
    small = layered(FACES, own)
    check(load_config("demo-backbone", small), 2)
    pairs = load_config("demo-backbone", [*small, "data.pairs_file=pairs.txt"])
    with pytest.raises(FileNotFoundError, match=r"data\.pairs_file pairs\.txt: no such file"):
        check(pairs, 2)
    Path("pairs.txt").touch()
    check(pairs, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.txt"]


@pytest.mark.slow
def test_a_run_that_is_there_goes_on_or_is_refused(
    tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, faces: ShardSet
) -> None:
    single(tiny("run"), *DAN, "train.max_steps=2")
    before = tree(tmp_path / "run")
    check(load_config(tiny("run"), DAN), 3)
    path = tmp_path / "run" / "step-00000002.pt"
    assert f"{path}: the run resumes after step 2" in caplog.messages
    check(load_config(tiny("run"), [*DAN, "model.backbone=/no.pth"]), 1)  # nobody looks at it
    for overrides, message in (
        (["model.heads=4"], r"another configuration: model\.heads was 2, is 4"),
        (["train.resume=never"], r"of an earlier run; train\.resume=auto resumes it"),
        (["train.max_steps=1"], r"at step 2 already, train\.epochs and train\.max_steps end at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check(load_config(tiny("run"), layered(DAN, overrides)), 1)
    with (
        locked(tmp_path / "run", ""),
        pytest.raises(BlockingIOError, match="is in use by another process"),
    ):
        check(load_config(tiny("run"), DAN), 1)
    check(load_config(tiny("new"), [*DAN, f"model.weights={path}"]), 1)
    assert f"network: from {path}, classifier and all" in caplog.messages
    check(load_config(tiny("new"), [*DAN, f"model.backbone={path}"]), 1)
    with pytest.raises(ValueError, match=r"has 2 heads, model\.heads is 3"):
        check(load_config(tiny("new"), layered(DAN, ["model.heads=3", f"model.weights={path}"])), 1)
    assert tree(tmp_path / "run") == before and not (tmp_path / "new").exists()


def test_a_run_of_an_earlier_version_s_keys_goes_on(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint's configuration has an old name, and a key that nothing reads any more."""
    single(tiny("run"), "train.max_steps=1")
    path = tmp_path / "run" / "step-00000001.pt"
    content = torch.load(path, weights_only=True)
    content["config"]["loss"]["lambda_affinity"] = content["config"]["loss"].pop("lambda_fcn")
    content["config"]["train"]["turbo"] = True
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"unknown key 'train\.turbo'"):
        check(load_config(tiny("run")), 1)
    monkeypatch.setattr(configuration, "GONE", ("train.turbo",))
    check(load_config(tiny("run")), 1)
    assert single(tiny("run"), "train.max_steps=2").status == "finished"


def test_identities_of_shards_are_judged_by_their_pairs(
    tiny: Write, people: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    check(load_config(tiny("run"), [*IDENTITY, f"data.shards={people.root}"]), 2)
    assert any(line.startswith("judged by 60 pairs") for line in caplog.messages)


def test_a_cache_that_is_not_filled_is_left_so(
    tiny: Write, tmp_path: Path, faces: ShardSet, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = load_config(tiny("run"), [f"data.cache={tmp_path / 'node' / 'cache'}"])
    check(config, 1)
    assert "the training copies 0." in caplog.text and not (tmp_path / "node").exists()
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"data\.cache .*: 0\.\d MB are needed, 0\.0 MB are free"):
        check(config, 1)


def test_an_imagenet_start_is_not_downloaded(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    check(load_config(tiny("run"), ["model.backbone=imagenet", "model.width=64"]), 1)
    assert f"the training downloads it to {tmp_path}/torch/hub/checkpoints/resnet18-" in caplog.text
    assert not (tmp_path / "torch").exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that knows one answer of MLflow's: there are no experiments."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None: ...

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


def test_mlflow_is_reachable_or_not(
    tiny: Write, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = load_config(tiny("run"), ["tracking.enabled=true"])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for uri, expected in (
        (server, "MLflow: reachable"),
        ("http://user:secret@127.0.0.1:9", "http://***@127.0.0.1:9 is not reachable: "),
        (database, f"MLflow: the training makes {tmp_path / 'mlflow.db'}"),
        ("sqlite:////proc/x/mlflow.db", "is not reachable: its folder /proc/x cannot be written"),
    ):
        caplog.clear()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        check(config, 1)
        assert expected in caplog.text and "secret" not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    with pytest.raises(ValueError, match=r"no experiment 9, .*mlflow\.db is not there yet"):
        check(load_config(tiny("run"), ["tracking.enabled=true", "tracking.experiment=id:9"]), 1)
    (tmp_path / "mlflow.db").write_text("a text, long enough for no database\n" * 100)
    with pytest.raises(ValueError, match=r"mlflow\.db cannot be opened: file is not a database"):
        check(config, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "run.yaml"]


def test_on_a_machine_without_gpus_other_machines_are_not_judged(
    tiny: Write, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node of 100 MB: with --ranks and train.device=auto what is needed is stated."""
    monkeypatch.setattr(room, "memory_bytes", lambda: 10**8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wide = ["model.width=64"]
    config = load_config(tiny("run"), [*wide, "train.device=auto", "train.global_batch=64"])
    check(config, 4, is_here=False)
    device, memory = (next(x for x in caplog.messages if x.startswith(f"{name}: "))
                      for name in ("device", "memory"))  # fmt: skip
    assert device.endswith("; 4 ranks, precision auto") and "node" not in device
    assert re.fullmatch(r"memory: 16 images of 32 px at once need more than \d+ MB .*", memory)
    for same, is_here in ((config, True), (load_config(tiny("run"), wide), False)):
        with pytest.raises(ValueError, match="cpu has 25 MB for a rank"):
            check(same, 4, is_here=is_here)


def test_a_run_s_folder_holds_its_configuration_from_the_start(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before data are opened; a refused one does not replace it, one that goes on does."""
    written, config = tmp_path / "run" / "config.yaml", load_config(tiny("run"))
    with pytest.raises(FileNotFoundError, match="no finished shards"):
        single(tiny("run"), "data.shards=/nowhere")
    assert load_config(written).data.shards == "/nowhere"
    single(tiny("run"), "train.max_steps=1")
    first = written.read_text()
    assert load_config(written) == load_config(tiny("run"), ["train.max_steps=1"])
    with pytest.raises(ValueError, match="another configuration"):
        single(tiny("run"), "model.heads=1", "loss.fcn=center")
    assert written.read_text() == first
    single(tiny("run"), "train.max_steps=2")
    assert single(written).status == "finished"  # a configuration like any other
    assert load_config(written).train.max_steps == 2
    assert written.read_text() == to_yaml(load_config(tiny("run"), ["train.max_steps=2"]))
    assert config.train.max_steps is None


def test_the_log_begins_with_what_a_user_asks_first(
    tiny: Write, tmp_path: Path, faces: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    single(tiny("run"), "train.max_steps=1", "train.micro_batch=4", "train.precision=float32")
    device, *lines = caplog.messages[:6]
    assert device.startswith("device: ") and device.endswith(", 1 rank on 1 node, float32")
    assert [line for line in lines if "micro-steps a step" not in line][:4] == [
        f"output: {tmp_path / 'run'}; tracking: off",
        "data: synthetic (seed 7, 32 px), 80 images of 8 classes, 16 to evaluate on",
        "batch: 8 images, 8 on each rank, in 2 micro-steps",
        "steps: 10 an epoch, 1 in all",
    ]
