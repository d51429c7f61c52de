"""Verification by pairs, and what a training on identities leaves: a backbone that others load."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import torchvision
from sklearn.metrics import roc_auc_score

from conftest import launch, outcome, single, train
from dan_dist.evaluation import evaluate as evaluation
from dan_dist.evaluation.verification import (
    FAR,
    FOLDS,
    Pairs,
    draw_pairs,
    read_pairs,
    similarities,
    verify,
)
from dan_dist.model import backbone
from dan_dist.model.backbone import BACKBONE, load_backbone
from dan_dist.model.dan import DAN
from dan_dist.model.weights import load_trained
from dan_dist.options import EvaluateOptions
from dan_dist.run import checkpoint
from shards.format import ShardSet

WIDE = "model.width=64"  # as torchvision's ResNet-18, which takes the backbone
Write = Callable[[str], Path]


@pytest.mark.parametrize(("persons", "images", "count"), [(20, 2, 6000), (300, 9, 600)])
def test_pairs_are_drawn_as_lfws(persons: int, images: int, count: int) -> None:
    """Folds share no person, kinds are even, no pair stands twice, and nothing else decides."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(persons) + 7, images))
    pairs = draw_pairs(labels, count)
    assert len(pairs.same) <= count and (pairs.first != pairs.second).all()
    assert ((labels[pairs.first] == labels[pairs.second]) == pairs.same).all()
    assert len({tuple(sorted(p)) for p in zip(pairs.first, pairs.second, strict=True)}) == len(
        pairs.same
    )
    own = [
        set(labels[np.r_[pairs.first[pairs.fold == k], pairs.second[pairs.fold == k]]].tolist())
        for k in range(FOLDS)
    ]
    assert sum(map(len, own)) == len(set().union(*own))
    for k in range(FOLDS):
        assert pairs.same[pairs.fold == k].mean() == 0.5
    if persons == 300:
        assert len(pairs.same) == count
    for field, again in zip(pairs, draw_pairs(labels, count), strict=True):
        assert (field == again).all()
    assert any((a != b).any() for a, b in zip(pairs, draw_pairs(labels, count, 1), strict=True)
               if a.shape == b.shape)  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "count", "line"),
    [
        (np.arange(19), 6000, "19 persons, verification needs 20: two in each of 10 folds"),
        (np.arange(40), 6000, "no person of a fold has two images"),
        (np.repeat(np.arange(40), 2), 19, "19 pairs, at least 20 are needed"),
    ],
)
def test_pairs_that_cannot_be_drawn(labels: np.ndarray, count: int, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        draw_pairs(labels, count)


def lfw(similarity: np.ndarray, pairs: Pairs) -> float:
    """The accuracy over folds by trying every threshold."""
    folds = []
    for k in range(FOLDS):
        rest, own = pairs.fold != k, pairs.fold == k
        choices = sorted({*similarity[rest].tolist(), np.inf}, reverse=True)
        hits = [((similarity[rest] >= t) == pairs.same[rest]).mean() for t in choices]
        best = choices[int(np.argmax(hits))]
        folds.append(((similarity[own] >= best) == pairs.same[own]).mean())
    return float(np.mean(folds))


@pytest.mark.parametrize("digits", [1, 6])  # with ties, and without
def test_figures_are_those_of_the_definitions(digits: int) -> None:
    rng = np.random.default_rng(digits)
    labels = np.repeat(np.arange(60), 8)
    pairs = draw_pairs(labels, 2400)
    similarity = np.round(rng.normal(pairs.same * 1.5, 1.0), digits)
    found = verify(similarity, pairs)
    one, two = similarity[pairs.same], similarity[~pairs.same]
    wins = (one[:, None] > two).mean() + (one[:, None] == two).mean() / 2
    assert found.metrics["auc"] == pytest.approx(wins, abs=1e-12)
    assert found.metrics["auc"] == roc_auc_score(pairs.same, similarity)
    rates = [(one >= t).mean() for t in [*similarity, np.inf] if (two >= t).mean() <= FAR]
    assert found.metrics["tar_at_far_0.001"] == pytest.approx(max(rates), abs=1e-12)
    assert found.metrics["accuracy"] == pytest.approx(lfw(similarity, pairs), abs=1e-12)
    assert found.right.mean() == pytest.approx(found.metrics["accuracy"], abs=0.01)


def test_features_that_are_not_finite_are_counted() -> None:
    nothing = np.zeros(1, np.int64)
    pairs = Pairs(nothing, nothing, np.zeros(1, bool), nothing)
    with pytest.raises(FloatingPointError, match="the features of 1 of 2 images are not finite"):
        similarities(np.array([[1, np.nan], [1, 2]], np.float32), pairs)


def test_similarities_are_cosines() -> None:
    features = np.array([[3, 4], [6, 8], [4, -3], [0, 0]], np.float32)
    first, second = np.array([0, 0, 0]), np.array([1, 2, 3])
    pairs = Pairs(first, second, np.zeros(3, bool), np.zeros(3, np.int64))
    assert similarities(features, pairs).tolist() == pytest.approx([1, 0, 0])


def pair_lines(people: ShardSet, form: str) -> list[str]:
    """A pair of one person and one of two for each fold, of the persons held out of training."""
    lines = []
    for k in range(FOLDS):
        a, b = (people.class_names[16 + 2 * k + i] for i in (0, 1))
        if form == "LFW's":
            lines += [f"{a}\t1\t2", f"{a}\t3\t{b}\t1"]
        else:
            lines += [f"{a}/{a}_0001.jpg {a}/{a}_0002.png", f"{a}/{a}_0003.jpg {b}/{b}_0001.jpg"]
    return [*(["10\t1"] if form == "LFW's" else []), *lines, ""]


@pytest.mark.parametrize("form", ["LFW's", "paths"])
def test_pairs_from_a_file(people: ShardSet, tmp_path: Path, form: str) -> None:
    """Of Windows, with a byte order mark, which is the worse case of the two."""
    path, split = tmp_path / "pairs.txt", people.split("val")
    path.write_text("\ufeff" + "\r\n".join(pair_lines(people, form)), newline="")
    pairs = read_pairs(path, split)
    assert pairs.same.tolist() == [True, False] * 10
    assert pairs.fold.tolist() == [k for k in range(10) for _ in range(2)]
    keys = list(split.keys())
    assert [keys[k].split("_", 2)[-1] for k in pairs.first[:2]] == [
        "person_00016_0001", "person_00016_0003"
    ]  # fmt: skip
    assert keys[pairs.second[1]].split("_", 2)[-1] == "person_00017_0001"


@pytest.mark.parametrize(
    ("spoilt", "line"),
    [
        ("person_00016 1", r"pairs\.txt, line 2: 'person_00016 1', expected 'PERSON n m'"),
        ("person_00016 1 x", r"line 2: 'person_00016 1 x', expected"),
        ("nobody 1 2", r"line 2: .* has no images 'nobody_0001' of 'nobody' in split 'val'"),
        ("person_00003 1 2", r"line 2: .* has no images 'person_00003_0001'"),  # of training
        ("person_00016 2 2", r"line 2: 'person_00016 2 2' is an image beside itself"),
        ("person_00016 1 person_00018 1", r"fold 1 of 10 lacks pairs of one person"),
        ("caf\udce9 1 2", r"line 2: b'caf\\xe9 1 2\\n' is no UTF-8"),
    ],
)
def test_files_of_pairs_that_cannot_be(
    people: ShardSet, tmp_path: Path, spoilt: str, line: str
) -> None:
    lines = pair_lines(people, "LFW's")
    text = "\n".join([lines[0], spoilt, *lines[2:]])
    (tmp_path / "pairs.txt").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=line):
        read_pairs(tmp_path / "pairs.txt", people.split("val"))
    (tmp_path / "pairs.txt").write_text("5\t300\n")
    with pytest.raises(ValueError, match="line 1: 5 folds, expected 10"):
        read_pairs(tmp_path / "pairs.txt", people.split("val"))


BAD = {
    "heads": (["model.heads=4"], r"task identity trains a backbone: model\.heads must be 0"),
    "losses": (["loss.fcn=affinity"], r"loss\.fcn must be none"),
    "whole network": (["model.weights=x.pt"], r"model\.weights must be null"),
    "margin": (["task=expression", "loss.classification=arcface"], r"only task=identity takes arc"),
    "no pairs": (["data.pairs=19"], r"data\.pairs is 19"),
    "no file": (["data.pairs_file=/nowhere.txt"], r"data\.pairs_file /nowhere\.txt: no such file"),
    "no split": (["data.val_split=test"], r"no split 'test' of identities that are held out"),
    "same persons": (["data.val_split=train"], r"16 identities of split 'train' are in training"),
    "expressions": (["task=expression"], r"'person_00016' of split 'val' has no training images"),
    "pairs of expressions": (
        ["task=expression", "data.pairs_file=x"],
        r"data\.pairs_file: only task=identity takes it",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("task", ["identity"], indirect=True)
def test_trainings_that_cannot_be(tiny: Write, task: list[str], case: str) -> None:
    overrides, line = BAD[case]
    with pytest.raises((ValueError, OSError), match=line) as caught:
        single(tiny("run"), *task, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["identity"], indirect=True)
def test_a_backbone_from_training_to_dan(
    tiny: Write, task: list[str], faces: ShardSet, people: ShardSet, tmp_path: Path,
    store: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """On two ranks under DeepSpeed, with ArcFace; judged by pairs, in MLflow, and started from."""
    options = [*task, "loss.classification=arcface", "engine.name=deepspeed", "engine.zero_stage=3",
               "optim.lr=1e-4", "train.max_steps=4", "tracking.enabled=true", WIDE]  # fmt: skip
    out = train(2, tiny("run"), *options, cwd=tmp_path)
    assert "auc" in out and "chance is 50.00 %" in out and "model.backbone=" in out
    best = checkpoint.load(tmp_path / "run" / checkpoint.BEST)
    assert len(best["class_names"]) == 16
    assert best["objective"]["network.classifier.weight"].shape == (16, 512)

    content = torch.load(tmp_path / "run" / BACKBONE, weights_only=True)
    torchvision.models.resnet18().load_state_dict(content["state_dict"], strict=True)
    client = mlflow.MlflowClient(store)
    (logged,) = client.search_runs([client.get_experiment_by_name("dan_dist").experiment_id])
    facts = content["provenance"]
    assert facts["run_id"] == logged.info.run_id and facts["fingerprint"] == people.fingerprint
    assert facts["auc"] == best["best"]["auc"] == logged.data.metrics["val/auc"]
    assert facts["identities"] == 16 and facts["image_size"] == 32
    assert {a.path for a in client.list_artifacts(logged.info.run_id)} >= {BACKBONE, "roc.png"}
    assert not (logged.outputs and logged.outputs.model_outputs)  # nobody is served 16 strangers

    for source in (BACKBONE, checkpoint.BEST):
        network = DAN(8, 2)
        line = load_backbone(network, str(tmp_path / "run" / source))
        assert "100 tensors" in line and (facts["run_id"] in line) == (source == BACKBONE)
        name = "network.backbone.layer4.1.conv2.weight"
        assert torch.equal(network.backbone.layer4[1].conv2.weight, best["objective"][name])
    with pytest.raises(ValueError, match="trained on task identity, expected expression"):
        load_trained(tmp_path / "run")

    caplog.set_level("INFO")
    start = f"model.backbone={tmp_path / 'run' / BACKBONE}"
    assert single(tiny("dan"), start, "train.max_steps=2", WIDE).status == "finished"
    assert f"provenance: run_id {facts['run_id']}, accuracy 0." in caplog.text

    # Judged once more by itself, on any number of ranks
    report = tmp_path / "run" / "best-synthetic-val" / evaluation.REPORT
    own = {"checkpoint": tmp_path / "run", "data": str(people.root), "no_tracking": True}
    evaluation.main(EvaluateOptions(**own, pairs=60))
    one = report.read_bytes()
    report.unlink()
    words = [tmp_path / "run", "--data", people.root, "--pairs", "60", "--no-tracking"]
    done = launch("evaluate", 2, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report.read_bytes() == one
    assert (report.parent / "roc.png").stat().st_size > 10_000
    found = json.loads(one)
    assert {key: found[key] for key in ("accuracy", "auc")} == {
        key: best["best"][key] for key in ("accuracy", "auc")
    }
    assert found["pairs"] == 60 and found["images"] <= 60
    path = tmp_path / "pairs.txt"
    path.write_text("\n".join(pair_lines(people, "LFW's")))
    by_file = evaluation.main(
        EvaluateOptions(**own, pairs_file=str(path), output=tmp_path / "by-file")
    )
    assert by_file["pairs"] == 20 and by_file["pairs_file"] == "pairs.txt"


@pytest.mark.parametrize("task", ["identity"], indirect=True)
def test_a_run_has_not_finished_before_its_backbone_is_there(
    tiny: Write, task: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def full(path: Path, content: Mapping[str, Any]) -> None:
        if path.name == BACKBONE:
            raise OSError(f"{path} cannot be written: No space left on device")
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "save", full)
        with pytest.raises(OSError, match="No space left"):
            single(tiny("run"), *task, "train.max_steps=2")
    assert outcome(tmp_path / "run")["status"] == "failed"
    assert single(tiny("run"), *task, "train.max_steps=2").status == "finished"
    assert outcome(tmp_path / "run")["status"] == "finished"
    assert (tmp_path / "run" / BACKBONE).is_file()
