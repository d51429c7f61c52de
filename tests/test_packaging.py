"""The installed package: built as a wheel, it works from any folder, without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import dan_dist
from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
TRAIN = [
    "data.synthetic.train=64", "data.synthetic.val=8", "data.synthetic.size=32", "model.heads=2",
    "model.image_size=32", "model.width=16", "train.global_batch=16", "train.epochs=1",
    "train.max_steps=2", "train.device=cpu", "train.log_every=1",
]  # fmt: skip


def test_every_folder_of_code_is_packaged() -> None:
    folders = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for package in ("dan_dist", "shards")
        for path in (REPOSITORY / package).rglob("*.py")
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted({*folders, "dan_dist.configs"})


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert dan_dist.__version__.count(".") == 2
    assert PROJECT["project"]["urls"] == {"Paper": "https://arxiv.org/abs/2109.07270"}


def test_each_program_has_an_entry_point() -> None:
    from dan_dist.__main__ import PROGRAMS

    expected = {f"dan-{name}": f"dan_dist.programs:{name}" for name in PROGRAMS}
    expected |= {f"dan-{name}": f"shards.command:{name}" for name in ("pack", "verify", "show")}
    assert PROJECT["project"]["scripts"] == expected
    # What ends a command stands around `main`: signals, its output, errors in one line, exit codes.
    assert not [name for name, entry in expected.items() if entry.endswith(":main")]


class Installed(NamedTuple):
    """An environment of its own with the wheel in it, and the dependencies of this one."""

    folder: Path  # an empty one to work in
    scripts: Path

    def run(self, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment in `folder`."""
        kept = ("HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH")
        environment = {key: os.environ[key] for key in kept if key in os.environ}
        environment |= {"PATH": f"{self.scripts}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(self.scripts / command[0]), *command[1:]], cwd=self.folder, env=environment,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done


def call(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build(folder: Path) -> Path:
    """The wheel, built of the archive of a copy of the sources."""
    sources = folder / "sources"
    for name in ("dan_dist", "shards", "configs", ".ci"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, sources / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, sources / name)
    archive = f"import build_backend; build_backend.build_sdist({str(folder)!r})"
    call(sys.executable, "-c", f"import sys; sys.path.insert(0, '.ci'); {archive}", cwd=sources)
    shutil.rmtree(sources)
    (packed,) = folder.glob("dan_dist-*.tar.gz")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    call(sys.executable, "-m", "pip", "wheel", packed, *offline, "-w", folder, cwd=folder)
    (wheel,) = folder.glob("dan_dist-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The environment lies in somebody's checkout of something else, as a `.venv` does."""
    home = tmp_path_factory.mktemp("home")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    call(*git, "init", "-q", cwd=home)
    call(*git, "commit", "-q", "--allow-empty", "-m", "theirs", cwd=home)
    environment, work = home / ".venv", home / "work"
    work.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=home)
    (site,) = environment.glob("lib/python*/site-packages")
    # The dependencies, without the .pth files beside them that lead to a checkout
    (site / "dependencies.pth").write_text("\n".join(_site_folders()))
    target = ["--python", environment / "bin" / "python"]
    options = ["--no-deps", "--no-index", "--force-reinstall"]
    call(sys.executable, "-m", "pip", *target, "install", *options, wheel, cwd=home)
    return Installed(work, environment / "bin")


def _site_folders() -> Sequence[str]:
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


@pytest.mark.slow
def test_the_wheel_holds_code_configurations_and_types_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    code = [name for name in names if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in code} == {"dan_dist", "shards"}
    others = {name for name in code if not name.endswith(".py")}
    configs = {f"dan_dist/configs/{p.name}" for p in (REPOSITORY / "configs").glob("*.yaml")}
    assert others == configs | {"dan_dist/py.typed", "shards/py.typed"}
    assert wheel.name.startswith(f"dan_dist-{dan_dist.__version__}-")


@pytest.mark.slow
def test_an_installed_package_trains_from_an_empty_folder(installed: Installed) -> None:
    code = "import dan_dist, shards; print(dan_dist.__file__, shards.__file__)"
    for path in installed.run("python", "-c", code).stdout.split():
        assert Path(path).is_relative_to(installed.scripts.parent)
    out = installed.run("dan-train", *TRAIN).stdout
    assert "finished after 2 steps" in out and "tracking: MLflow, sqlite:///" in out
    run = installed.folder / "runs" / "demo"
    assert {"best.pt", "config.yaml", "outcome.json"} <= {path.name for path in run.iterdir()}
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (tags,) = [r["tags"] for r in records if r["kind"] == "status" and r["status"] == "RUNNING"]
    assert tags["version"] == dan_dist.__version__
    assert tags["commit"] == "unknown"  # not that of the checkout around it
    again = installed.run("dan-train", "runs/demo/config.yaml", "--dry-run").stdout
    assert "# runs/demo/step-00000002.pt: the run resumes after step 2" in again
    report = installed.run("dan-evaluate", "runs/demo", "--data", "data/demo", "--no-tracking")
    assert "accuracy" in report.stdout


@pytest.mark.slow
def test_an_installed_package_trains_under_torchrun(installed: Installed) -> None:
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [*TRAIN, "train.output=runs/two", "tracking.enabled=false"]
    out = installed.run(*torchrun, "--no-python", "dan-train", *options).stdout
    assert "2 ranks on 1 node" in out and "finished after 2 steps" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECT["project"]["scripts"])
def test_every_entry_point_has_its_help(installed: Installed, name: str) -> None:
    done = installed.run(name, "--help")
    assert len(done.stdout.splitlines()) > 5 and not done.stderr


@pytest.mark.slow
def test_entry_points_end_with_their_code(installed: Installed) -> None:
    done = installed.run("dan-verify", "nowhere", code=2)
    assert done.stderr.startswith("error: nowhere/manifest.json not found")
    done = installed.run("dan-train", "rafbd", code=2)
    assert "did you mean rafdb? There are affectnet7, " in done.stderr
