"""Spoiled files in which runs, packs, caches and evaluations keep their state."""

import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from chaos_inputs import spoil_manifest, verified
from chaos_trial import Trial
from packs import pack_here
from spoiled import FOREIGN, damage
from trees import digests, packed, tree

from dan_dist.data.decoded import DecodedReader, decode_to_file, open_file
from dan_dist.data.reader import Reader
from dan_dist.evaluation import evaluate
from dan_dist.evaluation.records import PREDICTIONS, read_predictions
from dan_dist.options import EvaluateOptions
from dan_dist.run.outcome import OUTCOME, read_outcome, write_failure, write_outcome
from dan_dist.tracking import __main__ as tracking
from dan_dist.tracking.journal import Journal
from dan_dist.tracking.journal_files import NAME, SENT
from dan_dist.tracking.store import connect
from shards.packing import writer

POINTS = [(1, 0.5), (2, 0.25), (3, 0.125)]  # of the journal that is spoiled


def states(trial: Trial) -> None:
    """What goes on from a spoiled file of state ends right, begins that part anew, or names it."""
    trial.dice.choice((journals, journals, stores, outcomes, packs, packs, caches, evaluations))(
        trial
    )


def spoil_state(trial: Trial, path: Path) -> None:
    """Damages a file; of one in JSON, perhaps, a value, a line, or all of it."""
    dice, data = trial.dice, path.read_bytes()
    is_json = path.suffix not in (".npy", ".parquet", ".sums", ".pixels", ".db")
    kind = dice.choice(("bytes", "all", "value", "value") if is_json else ("bytes",))
    trial.named.append(path.name)
    if kind == "bytes":
        data, how = damage(dice, data)
    else:
        lines = data.splitlines() if path.name == NAME else [data]
        number = dice.randrange(len(lines))
        how = dice.choice([*FOREIGN])
        if kind == "value" and (content := json.loads(lines[number])):
            how = spoil_manifest(dice, content)
            lines[number] = json.dumps(content).encode()
        else:
            lines[number] = FOREIGN[how]
        data = b"\n".join(lines) + b"\n"
    path.write_bytes(data)
    trial.done.append(f"{path.name}: {how}")


def made_once(trial: Trial, name: str, make: Callable[[Path], object]) -> Path:
    """A folder for all trials."""
    path = trial.material.folder / "states" / name
    if not path.exists():
        path.mkdir(parents=True)
        make(path)
    return path


def made(trial: Trial, name: str, make: Callable[[Path], object]) -> Path:
    """The trial's own copy of what is made once."""
    return Path(shutil.copytree(made_once(trial, name, make), trial.folder / name))


def make_journal(trial: Trial) -> tuple[Path, str]:
    """A run's folder, all of whose records wait, and the name of its experiment."""
    folder, name = trial.folder / "run", trial.folder.name
    journal = Journal(folder)
    journal.append("run", experiment=name, name="n", parent=None, uri="x", time_ms=5,
                   params={"a": "1"}, config={"a": 1})  # fmt: skip
    for step, value in POINTS:
        journal.append("metrics", values={"train/loss": value}, step=step, time_ms=6 + step)
    journal.append("artifact", path="note.txt", folder="")
    journal.append("status", status="FINISHED", tags={"t": "1"}, time_ms=10)
    journal.close()
    (folder / "note.txt").write_text("note")
    return folder, name


def replay(folder: Path, store: Path) -> bool:
    """Whether the program has sent all; else it has said in one line why not."""
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"MLFLOW_TRACKING_URI": f"sqlite:///{store}"}),
        redirect_stdout(out),
        redirect_stderr(out),
    ):
        code = tracking.main(["replay", str(folder)])
    lines = out.getvalue().splitlines()
    assert "Traceback" not in out.getvalue(), out.getvalue()
    assert code in (0, 1) or (lines[-1].startswith("error: ") and lines[-1].isprintable()), lines
    return code == 0


def points(store: Path, experiment: str) -> list[list[tuple[int, float]]]:
    """The points of each run in an experiment."""
    client = connect(f"sqlite:///{store}")
    number = client.get_experiment_by_name(experiment).experiment_id
    history = partial(client.get_metric_history, key="train/loss")
    runs = client.search_runs([number])
    return [sorted((p.step, p.value) for p in history(run.info.run_id)) for run in runs]


def make_store(folder: Path) -> None:
    connect(f"sqlite:///{folder}/mlflow.db")


def journals(trial: Trial) -> None:
    """What is sent again stands there once."""
    run, name = make_journal(trial)
    store = made_once(trial, "store", make_store) / "mlflow.db"  # to open another takes a while
    assert replay(run, store) and points(store, name) == [POINTS]
    spoiled = trial.dice.choice((NAME, SENT))
    spoil_state(trial, run / spoiled)
    replay(run, store)
    for found in points(store, name):  # a run more, where the journal's own name is another
        assert len(found) == len(set(found)), found
    if spoiled == SENT:
        (run / SENT).unlink()
        assert replay(run, store) and points(store, name) == [POINTS]


def stores(trial: Trial) -> None:
    """A spoiled store refuses, or takes it; another takes all."""
    run, name = make_journal(trial)
    again = Path(shutil.copytree(run, trial.folder / "again"))
    store = made(trial, "store", make_store) / "mlflow.db"
    spoil_state(trial, store)
    replay(run, store)
    whole = trial.material.folder / "states" / "store" / "mlflow.db"
    assert replay(again, whole) and points(whole, name) == [POINTS]


def outcomes(trial: Trial) -> None:
    """The reason of a failure is written, whatever stood there; a finished run stays one."""
    folder = trial.folder
    write_outcome(folder, "preempted", step=4, reason="SIGTERM")
    spoil_state(trial, folder / OUTCOME)
    before = None
    try:
        before = read_outcome(folder)
    except ValueError as error:
        trial.check_refusal(error)
    write_failure(folder, step=5, reason="the real one", since_s=2e9 if before else 0.0)
    found = read_outcome(folder)
    is_kept = before is not None and (before["status"] == "finished" or before["time_s"] >= 2e9)
    assert is_kept or found["reason"] == "the real one", found


def packs(trial: Trial) -> None:
    """The same command ends as an undisturbed one, or names the file; with --overwrite it ends."""

    def make(folder: Path) -> None:
        source = tree(folder / "source")
        packed(source, folder / "whole")
        with mock.patch.object(writer, "_join", side_effect=KeyboardInterrupt):
            try:
                packed(source, folder / "out")
            except KeyboardInterrupt:
                return

    folder = made(trial, "pack", make)
    out = folder / "out"
    spoil_state(trial, out / trial.dice.choice(sorted(
        path.name for path in out.iterdir() if path.suffix in (".json", ".done", ".npy")
    )))  # fmt: skip
    command = ["folder", "--source", folder / "source", "--out", out, "--size", "24", "--workers",
               "1", "--shard-size", "4"]  # fmt: skip
    code, text = pack_here(*command)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text and (code, len(errors)) in ((0, 0), (2, 1)), (code, text)
    if code:
        trial.check_refusal(ValueError(errors[0]))
        code, text = pack_here(*command, "--overwrite")
    assert code == 0 and verified(out) == 0, text
    assert digests(out) == digests(folder / "whole"), "the pack is another"


def caches(trial: Trial) -> None:
    """Of decoded images each is the right one, or is reported."""
    split = trial.material.shards.split("train")

    def decode(folder: Path) -> str:
        return decode_to_file(split, fingerprint="0" * 16, cache=str(folder), image_size=32,
                              device=torch.device("cpu"), threads=1)  # fmt: skip

    folder = made(trial, "decoded", decode)
    pixels = Path(decode(folder))
    right = pixels.read_bytes()
    spoil_state(trial, pixels.with_suffix(trial.dice.choice((".json", ".sums", ".pixels"))))
    path = decode(folder)
    reader = DecodedReader(split, open_file(path, split, image_size=32), 10**6)
    for sample in range(len(split)):
        found = reader.read(sample).tobytes()
        size = len(found)
        is_right = found == right[sample * size : (sample + 1) * size]
        assert is_right or sample in reader.bad, f"sample {sample} is another"
    Reader.close(reader)


def evaluations(trial: Trial) -> None:
    """A spoiled report counts as another's, and predictions are read as written, or refused."""
    material = trial.material

    def judge(output: Path) -> None:
        evaluate.main(EvaluateOptions(
            checkpoint=material.run / "best.pt", data=str(material.shards.root), output=output,
            device="cpu", no_tracking=True,
        ))  # fmt: skip

    folder = made(trial, "evaluated", judge)
    right = read_predictions(folder / PREDICTIONS)
    name = trial.dice.choice((PREDICTIONS, PREDICTIONS, evaluate.REPORT))
    report = (folder / evaluate.REPORT).read_bytes()
    spoil_state(trial, folder / name)
    if name == evaluate.REPORT:
        judge(folder)
        reports = [path.read_bytes() for path in trial.folder.glob(f"evaluated*/{name}")]
        assert report in reports, "it was not written anew"
        return
    found = read_predictions(folder / name)
    assert len(found.keys) == len(right.keys) == len(found.probabilities), "other images"
