"""A trained network in use: predictions, exported files, the model that MLflow serves."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image

from conftest import DAN as OPTIONS
from conftest import LAUNCH, STEPS, copied, run, single
from dan_dist.data import crops
from dan_dist.data.reader import Reader
from dan_dist.distributed.heartbeat import session
from dan_dist.evaluation.predictions import predict as outputs
from dan_dist.inference import predict as prediction
from dan_dist.model.weights import load_trained
from dan_dist.options import PredictOptions
from dan_dist.tracking import logged_model
from dan_dist.tracking import tracker as tracking
from dan_dist.tracking.store import connect
from shards.format import ShardSet

Write = Callable[[str], Path]


def crop_files(faces: ShardSet, folder: Path) -> list[Path]:
    """The validation images as files, in the order of the index."""
    folder.mkdir()
    reader = Reader(faces.split("val"), max_bad=0)
    paths = [folder / f"{k:02d}.jpg" for k in range(16)]
    for number, path in enumerate(paths):
        path.write_bytes(reader.read(number).tobytes())
    reader.close()
    return paths


def evaluated(folder: Path, faces: ShardSet) -> NDArray[np.float32]:
    with session("cpu", timeout_s=60, on_loss=print) as (world, heart):
        split = faces.split("val")
        return outputs(load_trained(folder), split, world, heart, "auto")


@pytest.mark.slow
def test_predictions_are_those_of_the_evaluation(
    dan_run: Path, faces: ShardSet, tmp_path: Path
) -> None:
    """To the bit; beside a file that is no image, a larger one, and one that lies on its side."""
    paths = crop_files(faces, tmp_path / "crops")
    expected = evaluated(dan_run, faces)
    whole = paths[0].read_bytes()
    (tmp_path / "crops" / "broken.png").write_bytes(whole[:300])
    (tmp_path / "crops" / "cut.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    (tmp_path / "crops" / "notes.txt").write_text("not to be read")
    image = Image.open(paths[3])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    (tmp_path / "crops" / "inside").mkdir()
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "crops" / "inside" / "turned.jpg", exif=exif, quality=100)
    image.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "crops" / "inside" / "2.png")
    script, folder = LAUNCH / "predict.py", tmp_path / "crops"
    options = ["--json", "--features", "features.npy"]
    done = run(sys.executable, script, dan_run, folder, *options, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "each image is taken for the crop of one face\n"
        f"passed over in {folder}: 1 no picture (.txt)\n"
        "written: features.npy\n"
    )
    rows = {Path(row["image"]).name: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(rows)[-4:] == ["broken.png", "cut.jpg", "2.png", "turned.jpg"]
    for name in ("broken.png", "cut.jpg"):
        assert rows.pop(name)["error"].startswith("cannot be decoded")
    assert list(rows)[:-2] == [p.name for p in paths]
    names = faces.class_names
    for row in rows.values():
        assert row["class"] == names[np.argmax(list(row["probabilities"].values()))]
        assert tuple(row["probabilities"]) == names
    found = {name: np.float32(list(row["probabilities"].values())) for name, row in rows.items()}
    assert all((found[p.name] == row).all() for p, row in zip(paths, expected, strict=True))
    features = np.load(tmp_path / "features.npy")
    distances = np.linalg.norm(features - features[3], axis=1)
    others = np.delete(distances[: len(paths)], 3)
    assert (distances[-2:] < 0.5 * others.min()).all()


def test_predictions_as_a_table(
    baseline_run: Path, faces: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = crop_files(faces, tmp_path / "crops")
    expected = evaluated(baseline_run, faces)[1]
    best = baseline_run / "best.pt"
    unread = prediction.main(PredictOptions(checkpoint=best, images=(paths[1],)))
    head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert unread == 0 and head == ["image", "class", *faces.class_names]
    assert row[:2] == [str(paths[1]), faces.class_names[expected.argmax()]]
    # one image alone, where there were sixteen: the last bits may differ
    assert [float(v[:-1]) for v in row[2:]] == pytest.approx(100 * expected, abs=0.06)
    assert prediction.readable(Path("a\n\x1b[31m\udce9é")) == r"a\n\x1b[31m\udce9é"
    (tmp_path / "empty").mkdir()
    for path, images, line in (
        (best, tmp_path / "none.jpg", r"none\.jpg: no such file or folder"),
        (best, tmp_path / "empty", r"empty: no image in it \(\.avif, \.bmp"),
        (tmp_path / "x.pt", tmp_path / "crops", r"x\.pt: no such checkpoint"),
    ):
        with pytest.raises(FileNotFoundError, match=line):
            prediction.main(PredictOptions(checkpoint=path, images=(images,)))


def test_many_crops_keep_their_order(faces: ShardSet, tmp_path: Path) -> None:
    paths = crop_files(faces, tmp_path / "crops") * 10
    paths[77] = tmp_path / "gone.jpg"
    packed = crops.pack_images(paths, tmp_path, size=32, threads=3)
    assert packed.faults == {paths[77]: "No such file or directory"}
    assert packed.paths == paths[:77] + paths[78:]
    reader = Reader(packed.split, max_bad=0)
    assert all(reader.read(k).tobytes() == p.read_bytes() for k, p in enumerate(packed.paths))
    reader.close()


def logged(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("dan_dist").experiment_id
    return sorted(client.search_logged_models([experiment]), key=lambda m: int(m.params["step"]))


@pytest.mark.slow
def test_the_best_model_is_in_mlflow(
    dan_run: Path, tiny: Write, faces: ShardSet, tmp_path: Path, store: str
) -> None:
    """Loaded from there, it gives named probabilities for image bytes; nothing is pickled."""
    copied(dan_run, tmp_path / "run")
    shutil.copy(dan_run.parent / "mlflow.db", tmp_path)
    client = connect(store)
    (model,) = logged(client)
    assert model.status == "READY" and model.params["heads"] == "2"
    best = load_trained(tmp_path / "run")
    history = client.get_metric_history(model.source_run_id, "val/accuracy")
    measured = [m.value for m in history if m.step == best.step]
    assert measured == [m.value for m in model.metrics if m.key == "val/accuracy"]
    logged_model.log_model(client, model.source_run_id, tmp_path / "run" / "best.pt")
    assert len(logged(client)) == 1  # sent twice, it is there once
    assert len(client.get_metric_history(model.source_run_id, "val/accuracy")) == len(history)

    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{model.model_id}"))
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle")]
    assert load_trained(folder / "artifacts" / "best.pt").class_names == faces.class_names
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    paths = crop_files(faces, tmp_path / "crops")
    found = loaded.predict(pd.DataFrame({"image": [p.read_bytes() for p in paths]}))
    assert tuple(found.columns) == faces.class_names
    many = loaded.predict(pd.DataFrame({"image": [p.read_bytes() for p in paths * 5]}))
    assert len(many) == 80 and np.allclose(many[64:], found, atol=1e-6)  # more than a batch
    assert tuple(loaded.metadata.signature.outputs.input_names()) == faces.class_names
    assert np.abs(found.to_numpy() - evaluated(dan_run, faces)).max() < 1e-5
    buffer = io.BytesIO()
    Image.new("L", (50, 70), 90).save(buffer, "PNG")
    other = loaded.predict(pd.DataFrame({"image": [buffer.getvalue()]}))
    assert other.shape == (1, 8) and other.to_numpy().sum() == pytest.approx(1)
    whole = paths[0].read_bytes()
    for damaged in (b"no image", b"", whole[: len(whole) // 2] + b"\xff\xd9"):
        with pytest.raises(ValueError, match=r"image 1: "):
            loaded.predict(pd.DataFrame({"image": [buffer.getvalue(), damaged]}))
    mlflow.register_model(f"models:/{model.model_id}", "faces")
    assert mlflow.pyfunc.load_model("models:/faces/1").metadata.signature

    # A run that goes on and finds a better one logs that one too.
    tracked = [*OPTIONS, *STEPS, "tracking.enabled=true"]
    single(tiny("run"), *tracked, "train.max_steps=20", "train.epochs=9")
    assert len(logged(client)) == 1 + (load_trained(tmp_path / "run").step > best.step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", ["create_logged_model", "log_model_artifacts", "log_outputs", "finalize_logged_model"]
)
@pytest.mark.parametrize("done", [False, True])
def test_a_model_whose_logging_broke_off_is_logged_after_all(
    baseline_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str,
    call: str, done: bool,
) -> None:  # fmt: skip
    """Before the call arrived, or when only its answer was lost; the run has ended either way."""
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    original = getattr(mlflow.MlflowClient, call)

    def breaks(*arguments: Any, **options: Any) -> None:
        if done:
            original(*arguments, **options)
        raise ConnectionError("reset by peer")

    (folder := tmp_path / "run").mkdir()
    os.link(baseline_run / "best.pt", folder / "best.pt")
    record = tracking.RunRecord(experiment="dan_dist", name="run", params={}, config={})
    with monkeypatch.context() as broken:
        broken.setattr(mlflow.MlflowClient, call, breaks)
        with tracking.MlflowTracker(folder, record) as tracker:  # as a training ends
            tracker.metrics({"val/accuracy": 0.5}, 2)
            tracker.conclude("FINISHED", folder / "best.pt")
    client = connect(store)
    (found,) = client.search_runs([client.get_experiment_by_name("dan_dist").experiment_id])
    assert found.info.status == "FINISHED"
    assert tracking.replay(folder, store) == (1, []) and tracking.replay(folder) == (0, [])
    ready = [m for m in logged(client) if m.status == "READY"]
    assert len(logged(client)) == len(ready) == 1
    models = client.get_run(found.info.run_id).outputs.model_outputs
    assert [m.model_id for m in models] == [ready[0].model_id]
