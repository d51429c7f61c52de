"""Files in which a run or a pack keeps its state, after something else has written into them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from spoiled import FOREIGN
from trees import digests, packed

from conftest import history
from dan_dist.data.decoded import decode_to_file, open_file
from dan_dist.data.pixels import is_whole
from dan_dist.run.outcome import read_outcome, write_failure, write_outcome
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.figures import save
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.journal_files import Sent, read_records, read_sent
from shards.format import MANIFEST, ShardSet
from shards.packing import writer
from shards.packing.job import read_record
from shards.packing.writer import merge, pack
from shards.releases import folder

Content = pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
RUN: dict[str, Any] = {"experiment": "dan_dist", "name": "n", "parent": None, "time_ms": 5,
                       "params": {"a": "1"}, "config": {"a": 1}}  # fmt: skip


def assert_one_line(error: BaseException, path: Path, way_out: str) -> None:
    assert str(path) in str(error) and way_out in str(error), error
    assert str(error).isprintable() and len(str(error)) < 500


@Content
def test_outcomes(tmp_path: Path, content: bytes) -> None:
    """They are named; the reason of a failure is written all the same."""
    path = tmp_path / "outcome.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="what was written") as error:
        read_outcome(tmp_path)
    assert_one_line(error.value, path, "counts as one that was killed")
    write_failure(tmp_path, step=3, reason="the real one", since_s=0.0)
    assert read_outcome(tmp_path)["reason"] == "the real one"


@pytest.mark.parametrize(
    "key, value", [("time_s", None), ("time_s", "7"), ("time_s", float("nan")),
                   ("status", "ended"), ("step", [3]), ("reason", 5)],
)  # fmt: skip
def test_a_value_of_an_outcome(tmp_path: Path, key: str, value: object) -> None:
    write_outcome(tmp_path, "preempted", step=4, reason="SIGTERM")
    path = tmp_path / "outcome.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    write_failure(tmp_path, step=5, reason="the real one", since_s=0.0)
    assert read_outcome(tmp_path)["reason"] == "the real one"


def journal_of(path: Path, uri: str = "x") -> list[str]:
    """The lines of a run's journal, which has ended."""
    journal = Journal(path)
    journal.append("run", uri=uri, **RUN)
    journal.append("inputs", datasets=[], model=None)
    for step in (1, 2):
        journal.append("metrics", values={"train/loss": 0.5}, step=step, time_ms=6)
    (path / "note.txt").write_text("note")
    journal.append("artifact", path="note.txt", folder="")
    journal.append("status", status="FINISHED", tags={"t": "1"}, time_ms=7)
    journal.close()
    return (path / "journal.jsonl").read_text().splitlines()


@Content
@pytest.mark.parametrize("number", [1, 2, 4])
def test_lines_of_a_journal(tmp_path: Path, content: bytes, number: int) -> None:
    lines = [line.encode() for line in journal_of(tmp_path)]
    lines[number - 1] = content
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    for read in (Journal, read_records):
        with pytest.raises(ValueError, match=f"line {number}, is damaged: ") as error:
            read(tmp_path)
        assert_one_line(error.value, path, "without that file, the training goes on")
    path.unlink()
    Journal(tmp_path).close()


@pytest.mark.parametrize(
    "number, change",
    [(1, {"id": 5}), (1, {"kind": "run"}), (2, {"params": {"a": 1}}), (2, {"kind": "status"}),
     (2, {"uri": None}), (3, {"datasets": [{}]}), (3, {"datasets": ["a"]}), (3, {"model": ["r"]}),
     (4, {"values": {"a": None}}), (4, {"step": 1.5}), (4, {"step": 10**30}), (4, {"kind": "run"}),
     (4, {"kind": "metrisc"}), (4, {"time_ms": "6"}), (6, {"path": ["x"]}), (7, {"tags": [1]})],
)  # fmt: skip
def test_values_of_a_journal(tmp_path: Path, number: int, change: dict[str, Any]) -> None:
    lines = journal_of(tmp_path)
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | change)
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"journal\.jsonl, line {number}, is damaged: ") as error:
        Journal(tmp_path)
    assert_one_line(error.value, tmp_path, "without that file")


def test_what_was_sent_is_sent_again_and_kept_once(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    run, client = tmp_path / "run", mlflow.MlflowClient(store)
    journal_of(run, store)
    arrived, _ = tracking.replay(run, store)
    assert tracking.replay(run, store) == (0, [])
    sent = json.loads((run / "journal.sent").read_text())
    changes = [{"settled": "all"}, {"settled": {"records": "5"}}, {"run_id": 7}, {"run_id": None},
               {"left_out": [3]}, {"left_out": [{"number": 1}]}]  # fmt: skip
    spoiled = [json.dumps(sent | change).encode() for change in changes]
    for content in [*FOREIGN.values(), *spoiled]:
        (run / "journal.sent").write_bytes(content)
        caplog.clear()
        assert read_sent(run) == Sent({}, None, [])
        assert caplog.text.count("journal.sent is damaged") == 1
    for content in (FOREIGN["zeros"], spoiled[0]):
        (run / "journal.sent").write_bytes(content)
        assert tracking.replay(run, store) == (arrived, [])
        assert history(store) == [(1, 0.5), (2, 0.5)]
        found = client.get_run(sent["run_id"])
        assert found.info.status == "FINISHED" and found.data.params == {"a": "1"}
        names = [artifact.path for artifact in client.list_artifacts(sent["run_id"])]
        assert sorted(names) == ["config.yaml", "note.txt"]
        assert tracking.replay(run, store) == (0, [])
    gone = [{"number": n, "lane": "records", "what": "w", "reason": "r"} for n in (-1, 99)]
    (run / "journal.sent").write_text(json.dumps(sent | {"left_out": gone}))  # of a longer journal
    assert tracking.replay(run, store) == (0, [])


@pytest.mark.parametrize("content", [*FOREIGN.values(), b'{"90": "x"}', b'{"-1": "x"}',
                                     b'{"3": ""}', b'{"3": null}'])  # fmt: skip
def test_faults_of_decoded_images(faces: ShardSet, tmp_path: Path, content: bytes) -> None:
    split = faces.split("val")

    def decode() -> Path:
        return Path(
            decode_to_file(
                split, fingerprint="0" * 16, cache=str(tmp_path), image_size=32, threads=1,
                device=torch.device("cpu"),
            )
        )  # fmt: skip

    path = decode()
    path.with_suffix(".json").write_bytes(content)
    assert not is_whole(path, len(split), path.stat().st_size)
    with pytest.raises(OSError, match="not whole any more; the same command decodes anew"):
        open_file(str(path), split, image_size=32)
    assert decode() == path and not open_file(str(path), split, image_size=32).faults


class Killed(BaseException):
    pass


@pytest.fixture
def unfinished(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack that was killed when all its shards were written."""

    def kill(*_: object, **__: object) -> None:
        raise Killed

    out = shards.parent / "killed"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(writer, "_join", kill)
        packed(shards.parent / "source", out)
    assert (out / "packing.json").is_file() and not (out / MANIFEST).exists()
    return out


def test_plans_of_packs(unfinished: Path, shards: Path) -> None:
    path, release = unfinished / "packing.json", folder.release(shards.parent / "source")
    plan = json.loads(path.read_text())
    changes = [{"shards": {"train": ["../x-00000"]}}, {"shards": {"train": "x"}}, {"shards": {}},
               {"listed": {"train": "18"}}, {"class_names": [1, 2]}, {"class_names": ["one"]},
               {"face_cut": 5}, {"left_out": [1]}, {"size": "24"}]  # fmt: skip
    spoiled = [json.dumps(plan | change).encode() for change in changes]
    for content in [*FOREIGN.values(), *spoiled]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="what was written") as error:
            merge(unfinished)
        assert_one_line(error.value, path, "pack again with --overwrite")
        with pytest.raises(ValueError, match="--overwrite"):
            pack(release, unfinished, size=24, workers=1, shard_size=4)
    path.write_bytes(b"[")
    again = packed(shards.parent / "source", unfinished, overwrite=True)
    assert digests(again) == digests(shards)


def test_records_of_shards(unfinished: Path, shards: Path) -> None:
    """One that is not as it was written is none: its shard is packed anew."""
    name, done = "train-00-00001", unfinished / "train-00-00001.done"
    whole = done.read_bytes()
    assert read_record(unfinished, name) is not None
    digit = whole.index(b"[[0, ") + 5  # of an offset
    other = whole[:digit] + b"%d" % (int(whole[digit : digit + 1]) ^ 1) + whole[digit + 1 :]
    huge = whole.replace(b"[[0, ", b"[[0, " + b"9" * 30, 1)
    for content in [*FOREIGN.values(), other, huge]:
        done.write_bytes(content)
        assert read_record(unfinished, name) is None, content[:100]
    with pytest.raises(ValueError, match=f"1 of .* shards are not packed yet \\({name}"):
        merge(unfinished)
    assert digests(packed(shards.parent / "source", unfinished)) == digests(shards)


def test_likenesses(unfinished: Path, shards: Path) -> None:
    for at, name in ((3, "val-01-00000"), (40, "val-00-00000"), (-7, "train-00-00000")):
        content = bytearray((unfinished / f"{name}.npy").read_bytes())
        content[at] ^= 0x21  # of its magic, its header, a pixel
        (unfinished / f"{name}.npy").write_bytes(content)
        assert read_record(unfinished, name) is None
    with pytest.raises(ValueError, match=r"3 of \d+ shards are not packed"):
        merge(unfinished)
    assert digests(packed(shards.parent / "source", unfinished)) == digests(shards)


def test_a_figure_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(Figure(), tmp_path / "first.png")
    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space left") as error:
        disk.setattr(os, "fsync", full)
        save(Figure(), tmp_path / "second.png")
    assert error.value.filename == str(tmp_path / "second.png")
    assert [path.name for path in tmp_path.iterdir()] == ["first.png"]
