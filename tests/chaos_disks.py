"""Servers that lie, and disks that become full, under programs of this process."""

import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import torch
from chaos_inputs import verified
from chaos_trial import Trial
from packs import pack_here
from PIL import Image
from trees import digests, packed, tree
from web import ILLS, Server

from dan_dist.data import cache
from dan_dist.data.cache import localise
from dan_dist.data.decoded import decode_to_file, open_file
from dan_dist.evaluation import evaluate
from dan_dist.inference import predict
from dan_dist.options import EvaluateOptions, PredictOptions
from dan_dist.run import checkpoint
from shards import verify
from shards.show import overview

MOST = 64 * 2**20  # bytes that a lying server may make a program take


def servers(trial: Trial) -> None:
    """A set is copied from a server that lies about one file or some: right, or refused; then,
    from the same server that tells the truth, right."""
    material, dice, home = trial.material, trial.dice, trial.folder / "cache"
    files = sorted(material.digests)
    ills = {name: (dice.choice(ILLS), dice.choice((1, 1, 2, 99)))
            for name in dice.sample(files, dice.choice((1, 1, 3)))}  # fmt: skip
    trial.done.append(str(ills))
    with (
        mock.patch.multiple(cache, RETRY_S=0.01, READ_S=0.5),
        Server(material.shards.root) as server,
    ):
        trial.named = [server.url, *files]

        def ill(name: str, time: int) -> str | int:
            kind, times = ills.get(name, ("", 0))
            return kind if time <= times else ""

        server.ill = ill
        error = None
        try:
            check_copy(trial, localise(server.url, str(home)))
        except OSError as refused:
            error = refused
        except ValueError as refused:  # a manifest
            assert "manifest.json" in ills, refused
            error = refused
        assert server.sent < MOST, f"{server.sent:,} bytes were taken"
        kept = [p for p in home.rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in kept) < 2**21, kept
        assert not [p for p in kept if p.name.endswith(".partial")], kept
        server.ill = lambda *_: ""
        check_copy(trial, localise(server.url, str(home)))
        if error is not None:
            raise error


def check_copy(trial: Trial, folder: str) -> None:
    """A copy has what training reads: all files but DALI's own indexes."""
    right = {k: v for k, v in trial.material.digests.items() if not k.endswith(".idx")}
    assert digests(Path(folder)) == right, "the copy is not the set"


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A disk of so many bytes at `folder`. It takes root, and a mount namespace of one's own."""
    folder.mkdir()
    mount(folder, f"size={size_bytes}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    """A file that takes the disk's room but for so many bytes."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while (left := shutil.disk_usage(disk).free - leave_bytes) > 0:
            file.write(bytes(min(left, 2**20)))
            file.flush()
    return filler


def pack_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    source = trial.folder / "source"
    if not source.exists():
        tree(source)

    def work() -> None:
        code, text = pack_here("folder", "--source", source, "--out", disk / "out", "--size", "24",
                               "--workers", "1", "--shard-size", "4")  # fmt: skip
        assert "Traceback" not in text, text
        if code:
            raise OSError(next(li for li in text.splitlines() if li.startswith("error: ")))
        assert verified(disk / "out") == 0

    return work


def copy_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    root = str(trial.material.shards.root)
    return lambda: check_copy(trial, localise(root, str(disk / "cache")))


def save_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    content = checkpoint.read(trial.material.run / "best.pt")
    content = {k: v for k, v in content.items() if k != "objective"} | {
        "objective": {k: v for k, v in content["objective"].items() if v.numel() < 40_000}
    }

    def work() -> None:
        checkpoint.save(disk / "best.pt", content)
        assert checkpoint.read(disk / "best.pt").keys() == content.keys()

    return work


def predict_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    kind = trial.dice.choice(("csv", "parquet", "features", "draw"))
    (images := trial.folder / "images").mkdir(exist_ok=True)
    for k, data in enumerate(trial.material.images):
        (images / f"{k}.jpg").write_bytes(data)
    name = {"features": "features.npy", "draw": "drawn"}.get(kind, f"out.{kind}")
    run = trial.material.run / "best.pt"
    trial.named.append(str(disk / name))

    def work() -> None:
        options = PredictOptions(
            checkpoint=run, images=(images,), device="cpu", **{kind: disk / name}
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            assert predict.main(options) == 0
        assert (disk / name).exists()

    return work


def evaluate_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    run, data = trial.material.run / "best.pt", str(trial.material.shards.root)
    options = EvaluateOptions(checkpoint=run, data=data, output=disk / "evaluated", device="cpu",
                              no_tracking=True)  # fmt: skip

    def work() -> None:
        evaluate.main(options)
        assert json.loads((disk / "evaluated" / evaluate.REPORT).read_text())["images"] == 16

    return work


def decode_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    split = trial.material.shards.split("train")

    def work() -> None:
        path = decode_to_file(split, fingerprint="0" * 16, cache=str(disk), image_size=32,
                              device=torch.device("cpu"), threads=1)  # fmt: skip
        assert not open_file(path, split, image_size=32).faults

    return work


def leaks_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    """Of photographs: each stands in both splits."""
    source = tree(trial.folder / "source")
    for path in (source / "val").glob("*/*.jpg"):
        shutil.copy(path, source / "train" / path.parent.name / f"again-{path.name}")
    packed(source, trial.folder / "photographs")

    def work() -> None:
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            code = verify.main([str(trial.folder / "photographs"), "--workers", "1", "--leaks",
                                str(disk / "leaks")])  # fmt: skip
        assert "Traceback" not in errors.getvalue(), errors.getvalue()
        if code:
            lines = errors.getvalue().splitlines()
            raise OSError(next(line for line in lines if line.startswith("error: ")))
        assert len([*(disk / "leaks").iterdir()]) == 2

    return work


def show_onto(trial: Trial, disk: Path) -> Callable[[], None]:
    def work() -> None:
        overview(trial.material.shards, disk / "sheet.png")
        assert Image.open(disk / "sheet.png").size[0] > 0

    return work


WORKS = {"pack": (pack_onto, 40_000), "copy": (copy_onto, 250_000), "save": (save_onto, 900_000),
         "predict": (predict_onto, 60_000), "evaluate": (evaluate_onto, 200_000),
         "decode": (decode_onto, 250_000), "leaks": (leaks_onto, 30_000),
         "show": (show_onto, 200_000)}  # fmt: skip


def full_disks(trial: Trial) -> None:
    """What is written onto a disk that becomes full is whole, or absent and named; with room, the
    same command ends as on any disk."""
    dice = trial.dice
    name = dice.choice([*WORKS])
    make, need_bytes = WORKS[name]
    with small_disk(trial.folder / "disk", 2**23) as disk:
        work = make(trial, disk)
        filler = fill(disk, room := dice.randrange(need_bytes))
        trial.done.append(f"{name}, {room} bytes are free")
        trial.named.append(str(disk))
        error: OSError | None = None
        try:
            work()
        except OSError as refused:
            error = refused
            assert "No space left" in str(refused) or "needed" in str(refused), refused
        left = [p for p in disk.rglob("*.partial") if p.is_file()]
        assert not left, left
        filler.unlink()
        work()
        if error is not None:
            raise error
