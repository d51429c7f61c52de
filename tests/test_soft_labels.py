"""Votes and soft labels: from the index into the loss; a class that ends without images."""

import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from trees import packed, replace_index, tree

from conftest import largest_difference, single, weights
from dan_dist.build import join_sets
from dan_dist.config import load_config
from dan_dist.data.augment import Augment
from dan_dist.data.loader import Loader, check_soft_labels
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader
from dan_dist.data.sampler import rank_columns
from dan_dist.model.dan import DAN
from dan_dist.model.losses import Objective
from shards.format import ShardSet, open_shardset
from shards.index import index_dtype, read_index, soft_of, with_soft


def with_votes(shards: ShardSet, folder: Path, votes: np.ndarray | None = None) -> ShardSet:
    """A copy of a set whose training index has votes; by default all votes are for the label."""
    shutil.copytree(shards.root, folder)
    path = folder / shards.index_names["train"]
    index = np.load(path)
    path.unlink()  # it may be a hard link
    given = np.eye(8)[index["label"]] * 10 if votes is None else votes
    replace_index(folder, with_soft(index, given))
    return open_shardset(folder)


def random_votes(shards: ShardSet) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 10, (len(shards.split("train")), 8))


def test_the_loss_of_votes_by_hand() -> None:
    torch.manual_seed(0)
    objective = Objective(DAN(3, 0), 3, fcn="none", afn="none").double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    logits = objective.network(images).logits.detach()
    labels = torch.tensor([[0, 0.5, 0.25, 0.25], [2, 0, 0, 1]], dtype=torch.float32)
    found = objective(images, labels, 2)
    logs = (logits - logits.exp().sum(dim=1, keepdim=True).log()).tolist()
    expected = -(0.5 * logs[0][0] + 0.25 * logs[0][1] + 0.25 * logs[0][2] + logs[1][2]) / 2
    assert math.isclose(found.total.item(), expected, rel_tol=1e-12)


def test_where_all_votes_agree_loss_and_gradient_are_the_hard_ones() -> None:
    torch.manual_seed(0)
    objective = Objective(DAN(8, 2), 8, label_smoothing=0.1).double().eval()
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 7, 3, 3])
    soft = torch.cat([labels[:, None], torch.eye(8)[labels]], dim=1)
    results = []
    for given in (labels, soft):
        objective.zero_grad()
        loss = objective(images, given, 8)
        loss.total.backward()
        results.append([loss.parts, *(p.grad.clone() for p in objective.parameters())])
    for hard, other in zip(*results, strict=True):
        torch.testing.assert_close(other, hard, rtol=1e-12, atol=1e-14)


def test_a_batch_has_the_votes_of_its_images_and_of_substitutes(
    faces: ShardSet, tmp_path: Path
) -> None:
    votes = random_votes(faces)
    shards = with_votes(faces, tmp_path / "votes", votes)
    split = shards.split("train")
    shares = (votes / votes.sum(axis=1, keepdims=True)).astype(np.float32)
    order = TrainOrder(split, rank_columns(12, 0, 1), global_batch=12, seed=3, balanced=True)
    loader = Loader(
        Reader(split, 2), order, image_size=32, augment=Augment(0.5, 0, 0, (1, 1), 0, 0),
        device=torch.device("cpu"), threads=1, soft=True,
    )  # fmt: skip
    loader.reader.report(0, "made up")
    first = np.flatnonzero(split.index["label"] == split.index["label"][0])[1]
    seen = 0
    batches = [next(loader) for _ in range(12)]
    loader.close()
    for batch in batches:
        used = [first if k == 0 else k for k in batch.ids.tolist()]
        seen += 0 in batch.ids.tolist()
        assert batch.labels[:, 0].tolist() == split.index["label"][batch.ids.numpy()].tolist()
        assert np.array_equal(batch.labels[:, 1:].numpy(), shares[used])
    assert seen


@pytest.mark.slow
def test_a_training_on_votes_that_agree_is_the_hard_one(faces: ShardSet, tmp_path: Path) -> None:
    shards = with_votes(faces, tmp_path / "votes")
    options = ["data.synthetic=null", f"data.shards={shards.root}", "model.image_size=32",
               "model.heads=0", "loss.fcn=none", "loss.afn=none", "train.global_batch=16",
               "train.micro_batch=8", "train.max_steps=2", "tracking.enabled=false",
               "train.precision=float64", "optim.lr=1e-4"]  # fmt: skip
    for kind in ("softmax", "soft"):
        single(Path("demo"), *options, f"loss.classification={kind}",
               f"train.output={tmp_path / kind}")  # fmt: skip
    found = [weights(tmp_path / kind) for kind in ("softmax", "soft")]
    assert largest_difference(*found) < 1e-9


def test_sets_without_votes_are_refused(faces: ShardSet) -> None:
    with pytest.raises(ValueError, match="classification=soft needs votes or soft labels"):
        check_soft_labels(faces.split("train"), faces.root)
    with pytest.raises(ValueError, match="only task=expression takes soft"):
        load_config("demo-backbone", ["loss.classification=soft"])


def test_votes_of_several_sets_meet_by_class(faces: ShardSet, tmp_path: Path) -> None:
    shards = with_votes(faces, tmp_path / "votes", random_votes(faces))
    order = [*faces.class_names[::-1]]
    config = load_config("demo", [
        "data.synthetic=null", f"data.shards=[{{path: {shards.root}}}, {{path: {faces.root}}}]",
        f"data.classes={order}",
    ])  # fmt: skip
    assert soft_of(join_sets(config, [shards, faces]).split("train").index) is None
    found = join_sets(config, [shards, shards]).split("train").index
    expected = shards.split("train").index["soft"][:, ::-1]
    assert found["soft"] == pytest.approx(np.concatenate([expected, expected]))


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1.0]])
def test_an_index_whose_shares_are_none_is_refused(tmp_path: Path, shares: list[float]) -> None:
    rows = np.zeros(1, index_dtype(2))
    rows["size"], rows["soft"] = 1, shares
    np.save(tmp_path / "index.npy", rows)
    with pytest.raises(ValueError, match="shares of classes that do not add up to 1"):
        read_index(tmp_path / "index.npy", [10], 1, 2)


def test_a_class_without_readable_training_images_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And told where it has none left in another split; once mended, the same command resumes."""
    source, whole = tree(tmp_path / "source", train=120, val=1), tmp_path / "whole.jpg"
    for k in range(1, 120):
        (source / "train" / "happy" / f"{k}.jpg").unlink()
    for split in ("train", "val"):
        shutil.copy(source / split / "happy" / "0.jpg", whole)
        (source / split / "happy" / "0.jpg").write_bytes(whole.read_bytes()[:300])
    (source / "val" / "happy" / "0.jpg").write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match="class 'happy' has no training images left"):
        packed(source, tmp_path / "out")
    (source / "train" / "happy" / "0.jpg").write_bytes(whole.read_bytes())
    (source / "val" / "happy" / "0.jpg").write_bytes(whole.read_bytes()[:300])
    with caplog.at_level(logging.WARNING, logger="shards"):
        shards = open_shardset(packed(source, tmp_path / "again"))
    assert "class 'happy' has no image left in split 'val'" in caplog.text
    assert shards.counts == {"train": (120, 1), "val": (1, 0)}
    (source / "val" / "happy" / "0.jpg").write_bytes(whole.read_bytes())
    assert open_shardset(packed(source, tmp_path / "out")).counts["train"] == (120, 1)
