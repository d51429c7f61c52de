"""A training computes on what was packed: its index is the manifest's, on all ranks, to the end."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ranks
from torch.distributed import HashStore
from trees import replace_index

from conftest import errors, launch, single, weights
from dan_dist import train as story
from dan_dist.data.loader import evaluation_loader
from dan_dist.data.mixture import Part, join
from dan_dist.distributed.world import World
from dan_dist.evaluation import result
from dan_dist.evaluation.evaluate import check_same
from dan_dist.evaluation.evaluate import main as evaluate
from dan_dist.options import EvaluateOptions
from dan_dist.run.folder import CheckpointWriter
from shards.files import read_bounded
from shards.format import MANIFEST, MANIFEST_BYTES, ShardSet, open_shardset
from shards.index import index_dtype, most_bytes, read_index, with_soft

CPU = torch.device("cpu")
Write = Callable[[str], Path]


def flip(index: np.ndarray, field: str) -> None:
    """One bit, which leaves every row within range."""
    index[field][5] ^= 1


def exchange(index: np.ndarray, field: str) -> None:
    """The values of two samples, one another's, as in an older copy of a set in another order."""
    index[field][[0, -1]] = index[field][[-1, 0]]


def evaluation(run: Path, data: str) -> EvaluateOptions:
    return EvaluateOptions(checkpoint=run, data=data, device="cpu", no_tracking=True)


def spoilt(faces: ShardSet, root: Path, split: str, field: str, how: Callable) -> Path:
    """A copy of the faces with another index than was packed."""
    shutil.copytree(faces.root, root)
    index = np.load(root / f"index-{split}.npy")
    how(index, field)
    np.save(root / f"index-{split}.npy", index)
    return root


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("field", "how"),
    [("label", flip), ("crc32", flip), ("offset", flip), ("label", exchange), ("size", flip)],
)
def test_another_index_than_was_packed_is_refused(
    faces: ShardSet, tmp_path: Path, split: str, field: str, how: Callable
) -> None:
    own = open_shardset(spoilt(faces, tmp_path / "set", split, field, how))
    path = own.root / f"index-{split}.npy"
    expected = rf"{path}: its sha256 is [0-9a-f]+, the manifest lists {own.index_sha256[split]}: it"
    with pytest.raises(ValueError, match=expected):
        own.split(split)
    with pytest.raises(ValueError, match=expected):
        join([Part(faces, 1, {}), Part(own, 1, {})], None).split(split)


@pytest.mark.slow
def test_no_program_takes_another_index(
    faces: ShardSet, baseline_run: Path, tiny: Write, tmp_path: Path
) -> None:
    """Training, its dry run, and an evaluation; before anything is computed."""
    root = spoilt(faces, tmp_path / "set", "val", "label", flip)
    refused = r"index-val\.npy: its sha256 is"
    with pytest.raises(ValueError, match=refused):
        single(tiny("run"), f"data.shards={root}")
    assert not list((tmp_path / "run").glob("*.pt"))
    with pytest.raises(ValueError, match=refused):
        evaluate(evaluation(baseline_run, str(root)))
    done = launch("train", 1, tiny("run"), f"data.shards={root}", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2 and "index-val.npy: its sha256 is" in errors(done)[0]


def work_on_own_set(program: str, words: list[str]) -> str:
    """One rank of two, whose folder of the same name holds another set; its error."""
    os.chdir(os.environ["RANK"])
    try:
        if program == "train":
            single(Path(words[0]), *words[1:])
        else:
            evaluate(evaluation(Path(words[0]), "set"))
    except (ValueError, OSError) as error:
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_two_nodes_with_two_sets_are_told_apart(
    faces: ShardSet, baseline_run: Path, tiny: Write, tmp_path: Path, program: str
) -> None:
    """The same number of images, the same names: one label differs, and the manifest fits it."""
    index = np.load(spoilt(faces, tmp_path / "1" / "set", "val", "label", flip) / "index-val.npy")
    replace_index(tmp_path / "1" / "set", index, "val")
    shutil.copytree(faces.root, tmp_path / "0" / "set")
    words = [str(tiny("run")), "data.shards=set"] if program == "train" else [str(baseline_run)]
    other = open_shardset(tmp_path / "1" / "set").fingerprint
    first, second = ranks(2, work_on_own_set, program, words)
    assert first == second and first.startswith("rank 1 on ")
    assert f"set: the images' fingerprint is {other}, on rank 0 it is {faces.fingerprint}" in first


def on_two_nodes(task: Callable[[World], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The errors of two ranks, each a thread and a node of its own."""
    store = HashStore()
    monkeypatch.setattr(socket, "gethostname", lambda: threading.current_thread().name)

    def rank(number: int) -> str:
        try:
            task(World(number, 0, 2, 1, CPU, store))
        except ValueError as error:
            return str(error)
        return "no error"

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


@pytest.mark.parametrize("what", ["checkpoint", "pairs", "resumed", "best"])
def test_two_nodes_with_other_files_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    for rank, content in enumerate((b"first", b"second")):
        (tmp_path / f"{rank}.pt").write_bytes(content if what != "pairs" else b"")
    shards: Any = SimpleNamespace(root="set", fingerprint="f")
    task: Any = SimpleNamespace(images=SimpleNamespace(name="test"))

    def work(world: World) -> None:
        path = tmp_path / f"{world.rank}.pt"
        trained: Any = SimpleNamespace(path=path)
        if what == "resumed":
            story.read_on_all(str(path), None, None, world)  # type: ignore[arg-type]
        elif what == "best":
            result.look_once(tmp_path, task, world, None, step=1, facts={})  # type: ignore[arg-type]
        else:
            inputs: Any = SimpleNamespace(facts={"pairs_sha256": str(world.rank)})
            check_same(trained, shards, inputs, world)

    own = lambda folder: SimpleNamespace(path=tmp_path / f"{next(ranks_)}.pt")  # noqa: E731
    ranks_ = iter(range(2))
    monkeypatch.setattr(result, "load_trained", own)
    monkeypatch.setattr(result, "predict", lambda *_: pytest.fail("was not told apart"))
    monkeypatch.setattr(story, "read_checkpoint", lambda *_: {})
    first, second = on_two_nodes(work, monkeypatch)
    assert first == second and first.startswith("rank 1 on ")
    named = (
        "set: the sha256 of the pairs is 1, on rank 0 it is 0" if what == "pairs" else ".pt: its"
    )
    assert named in first


def test_one_rank_is_equal_to_itself() -> None:
    World(0, 0, 1, 1, CPU).check_equal("x", "a")


def test_what_becomes_of_the_folder_changes_no_batch(faces: ShardSet, tmp_path: Path) -> None:
    """The index cut short, written over, removed, while a loader is at work: no byte is mapped."""
    shutil.copytree(faces.root, tmp_path / "set")
    path = tmp_path / "set" / "index-val.npy"
    options = {"rank": 0, "world_size": 1, "image_size": 32, "device": CPU, "threads": 1}
    split = open_shardset(tmp_path / "set").split("val")
    with evaluation_loader(split, **options) as loader:
        expected = next(loader)
        for content in (b"", os.urandom(path.stat().st_size)):
            path.write_bytes(content)
            batch = next(loader)
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.labels, expected.labels)
    path.unlink()
    assert split.index["label"].tolist() == faces.split("val").index["label"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["packed over", "removed"])
def test_a_set_that_is_replaced_under_a_training_is_named(
    faces: ShardSet, tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, how: str,
) -> None:  # fmt: skip
    """The run goes on with what it has open, and ends as if nothing had been."""
    root = Path(shutil.copytree(faces.root, tmp_path / "set"))
    options = [f"data.shards={root}", "train.max_steps=4", "train.checkpoint_every=2"]
    single(tiny("calm"), *options)
    assert "holds another set now" not in caplog.text
    write = CheckpointWriter.write

    def replace_first(self: CheckpointWriter, step: int, *rest: object, **more: object) -> None:
        for path in root.iterdir() if root.exists() else []:
            path.unlink()
        if how == "packed over":
            other = np.load(faces.root / "index-train.npy")
            other["label"] = other["label"][::-1]
            shutil.copytree(faces.root, root, dirs_exist_ok=True)
            replace_index(root, other)
        write(self, step, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "write", replace_first)
    single(tiny("run"), *options)
    assert f"{root} holds another set now, or none: this run goes on" in caplog.text
    a, b = weights(tmp_path / "calm"), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises((ValueError, OSError), match=r"trained on other images|not found"):
        single(tiny("run"), *options[:1], "train.max_steps=6")


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a":' * 10**5, b"\xff" * 9, b"null", b"7"])
def test_a_manifest_of_any_bytes_is_one_line(
    faces: ShardSet, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of shards: .+"):
        open_shardset(tmp_path)


def test_files_have_bounds(faces: ShardSet, tmp_path: Path) -> None:
    """A manifest of 8 GiB and an index of as many take no memory."""
    root = Path(shutil.copytree(faces.root, tmp_path / "set"))
    os.truncate(root / "index-train.npy", 2**33)
    with pytest.raises(ValueError, match=r"index-train\.npy: .* rows, \(80,\) of .* lists 80 sam"):
        open_shardset(root).split("train")
    many = index_dtype(80_000)  # shares of persons, which no set has
    np.save(root / "soft.npy", np.zeros(2, many))
    with pytest.raises(ValueError, match=r"soft\.npy: 2 rows, .*\(80000,\).* lists 2 samples"):
        read_index(root / "soft.npy", [10**6], 2, 80_000)
    assert most_bytes(2, 80_000) < 5000 < most_bytes(2, 900)
    with pytest.raises(ValueError, match="shares of 80,000 classes, at most 1,000 are kept"):
        with_soft(np.zeros(1, index_dtype()), np.ones((1, 80_000), np.float32))
    os.truncate(root / MANIFEST, 2**33)
    with pytest.raises(ValueError, match=rf"{MANIFEST} has more than {MANIFEST_BYTES:,} bytes"):
        open_shardset(root)
    (tmp_path / "x").write_bytes(json.dumps([1]).encode())
    assert read_bounded(tmp_path / "x", 3) == b"[1]"
