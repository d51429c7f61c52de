"""What a run needs and may use: cores, memory, disk; absurd values are refused."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ALONE, single
from dan_dist import programs, room
from dan_dist.config import layered, load_config
from dan_dist.distributed.world import World
from dan_dist.run.signals import StopRequest
from shards import limits, pack, verify

MANY = list(range(16))


def cgroups(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str, files: dict[str, str]) -> None:
    """A machine of 16 cores and 64 GB whose cgroups are these files; own: /proc/self/cgroup."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    (folder / "own").write_text(own)
    monkeypatch.setattr(limits, "CGROUPS", folder)
    monkeypatch.setattr(limits, "OWN", folder / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(MANY))
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2**24)
    monkeypatch.setattr(
        limits.resource, "getrlimit", lambda _: (limits.resource.RLIM_INFINITY,) * 2
    )


V1 = "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/x\n"


@pytest.mark.parametrize(
    ("own", "files", "cores", "gigabytes"),
    [
        ("0::/", {}, 16, 64),
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, 16, 64),
        ("0::/", {"cpu.max": "250000 100000", "memory.max": str(2**33)}, 3, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1, 64),
        ("0::/a/b", {"a/b/memory.max": str(2**34), "a/memory.max": str(2**32)}, 16, 4),
        ("0::/../host", {"cpu.max": "400000 100000"}, 4, 64),  # the path is the host's
        (V1, {"cpu/docker/ab/cpu.cfs_quota_us": "-1", "cpu/docker/ab/cpu.cfs_period_us": "100000",
              "memory/memory.limit_in_bytes": str(2**63 - 4096)}, 16, 64),
        (V1, {"cpu/cpu.cfs_quota_us": "800000", "cpu/cpu.cfs_period_us": "100000",
              "memory/docker/ab/memory.limit_in_bytes": str(2**31)}, 8, 2),
        ("", {"cpu.max": "100000 100000"}, 16, 64),
    ],
)  # fmt: skip
def test_cores_and_memory_are_those_of_the_cgroup(
    own: str, files: dict[str, str], cores: int, gigabytes: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    cgroups(monkeypatch, tmp_path, own, files)
    assert (limits.core_count(), limits.memory_bytes() / 2**30) == (cores, gigabytes)


@pytest.mark.parametrize(
    ("own", "files", "gigabytes"),
    [
        ("0::/", {"memory.current": str(2**30)}, None),
        ("0::/", {"memory.max": str(2**33), "memory.current": str(2**32 + 2**31),
                  "memory.stat": f"anon 5\ninactive_file {2**31}"}, 4),
        ("0::/a/b", {"a/b/memory.max": str(2**34), "a/b/memory.current": "0",
                     "a/memory.max": str(2**34), "a/memory.current": str(15 * 2**30)}, 1),
        (V1, {"memory/memory.limit_in_bytes": str(2**32),
              "memory/memory.usage_in_bytes": str(2**31),
              "memory/memory.stat": f"total_inactive_file {2**30}"}, 3),
        ("0::/", {"memory.max": str(2**30), "memory.current": str(2**31)}, 0),
    ],
)  # fmt: skip
def test_memory_that_is_left_is_that_of_the_cgroups(
    own: str, files: dict[str, str], gigabytes: int | None,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    cgroups(monkeypatch, tmp_path, own, files)
    left = limits.left_bytes()
    assert left == (None if gigabytes is None else gigabytes * 2**30)


def test_ranks_share_a_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four ranks beside each of two sockets: the affinity is a socket's, the quota all ranks'."""
    cgroups(monkeypatch, tmp_path, "0::/", {"cpu.max": "1600000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert World(0, 0, 8, 8, torch.device("cuda", 0), neighbours=4).cores == 2
    assert World(0, 0, 1, 1, torch.device("cpu")).cores == 16


ABSURD = {
    "model.image_size": 2**30, "model.heads": 10**6, "data.threads": 500, "train.epochs": 10**15,
    "train.global_batch": 2**40, "train.micro_batch": 2**60, "train.max_steps": 2**63,
    "train.keep_checkpoints": 10**12, "train.log_every": 10**10, "train.timeout_s": 1e308,
    "train.checkpoint_minutes": 1e300, "train.seed": 2**63, "train.max_skipped_steps": 2**62,
    "data.max_bad_images": 2**62, "data.pairs": 10**9, "data.synthetic.train": 10**12,
    "data.synthetic.size": 10**6, "data.synthetic.seed": 2**64, "data.synthetic.identities": 10**9,
    "data.augment.scale": "[1e-300, 1]", "optim.lr": 1e300, "optim.weight_decay": 1e308,
    "optim.clip_norm": 1e200, "schedule.warmup_steps": 2**60, "schedule.warmup_epochs": 1e300,
    "schedule.every": 10**30, "schedule.reference_batch": 10**20, "loss.lambda_fcn": 1e307,
    "loss.arcface_s": 1e30,
    "data.sampling": "{power: 1e6}", "data.shards": "[{path: a, share: 1e9}]"
}  # fmt: skip


@pytest.mark.parametrize("key", ABSURD)
def test_absurd_values_are_refused_by_the_schema(key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")) as caught:
        load_config("demo", [f"{key}={ABSURD[key]}"])
    assert "\n" not in str(caught.value)


def test_absurd_numbers_of_workers_runs_and_pixels_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for program in (lambda *own: pack.main(["folder", "--source", "x", "--out", "y", *own]),
                    lambda *own: verify.main(["x", *own])):  # fmt: skip
        for workers in ("-1", "100000", "two"):
            with pytest.raises(SystemExit):
                program("--workers", workers)
            assert f"{workers!r}, expected 0 to 1024 processes" in capsys.readouterr().err
    for options in (["--seeds", "1000000000"], ["--nproc", "100000"]):
        with pytest.raises(ValueError, match=f"{options[1]}, expected 1 to 1000"):
            programs._ablate(["heads", *options], StopRequest())
    for size in ("0", "100000", "9" * 5000):
        with pytest.raises(SystemExit):
            pack.main(["folder", "--source", "x", "--out", "y", "--size", size])
        assert "must be 1 to 4096 pixels or 'native'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.image_size=1024", "train.global_batch=2000"],
         r"2000 images of 1024 px at once need more than \d+ GB of memory, cpu has 8,590 MB for "
         r"a rank; give train\.micro_batch=\d+ or less, or a smaller model\.image_size"),
        (["train.global_batch=1000000", "train.micro_batch=1", "model.image_size=224"],
         "give a smaller model.heads, model.image_size or train.global_batch"),
        (["model.heads=64", "train.precision=float64", "model.image_size=1024"], "1024 px at once"),
        (["model.image_size=224", "train.micro_batch=32"], ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_into_memory_is_refused_before_a_step(
    words: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory_bytes", lambda: 2**33)
    config = load_config("demo", layered(["train.precision=bf16"], words))
    with pytest.raises(ValueError, match=line) if line else nullcontext():
        room.check_room(config, ALONE, 8)


def test_a_training_states_its_disk_use_and_takes_no_more(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["train.max_steps=6", "train.checkpoint_every=1", "optim.name=adam",
               "model.width=64"]  # fmt: skip
    with caplog.at_level(logging.INFO, "dan_dist"):
        single(tiny("run"), *options)
    line = next(text for text in caplog.messages if text.startswith("disk: "))
    assert f"{tmp_path / 'run'} (3 checkpoints of 134 MB, the best of 45 MB); " in line
    size = {path.name: path.stat().st_size for path in (tmp_path / "run").glob("*.pt")}
    assert (
        0.99 < size["step-00000006.pt"] / 134.3e6 < 1.02 and 0.99 < size["best.pt"] / 44.8e6 < 1.02
    )
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    caplog.clear()
    room.check_room(load_config(tiny("run"), options), ALONE, 8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].endswith("; 1 MB are free")
