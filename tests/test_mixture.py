"""Several sets in one training: classes meet by name, shares multiply, each set is judged alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from web import Server

from conftest import REPOSITORY, shared, single, weights
from dan_dist.config import load_config, to_yaml
from dan_dist.data.mixture import Part, groups_of, join, shares_of
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader, TooMuchDamageError
from dan_dist.evaluation.evaluate import main as evaluate
from dan_dist.options import EvaluateOptions
from dan_dist.run.folder import newest_checkpoint
from shards.format import ShardSet, open_shardset
from shards.packing.writer import pack
from shards.releases import folder, synthetic

Write = Callable[[str], Path]
NAMES = {"happiness": "happy", "angry": "anger"}


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """40 training faces of seven classes, two of other names and none of contempt; 14 to judge."""
    drawn = synthetic.release(46, 16, size=32, seed=9)
    named = tuple({v: k for k, v in NAMES.items()}.get(n, n) for n in drawn.class_names)[:7]
    splits = {n: [i for i in items if i.label < 7] for n, items in drawn.splits.items()}
    release = replace(drawn, dataset="others", class_names=named, splits=splits)
    root = shared(
        tmp_path_factory, "others", lambda f: pack(release, f, size=32, workers=1, shard_size=16)
    )
    return open_shardset(root)


def sets(*parts: tuple[ShardSet, float]) -> str:
    """The override of a configuration for some sets at shares; `others` is renamed."""
    described = [
        {"path": str(own.root), "share": share} | ({"classes": NAMES} if "angry" in own.class_names
                                                   else {})
        for own, share in parts
    ]  # fmt: skip
    return f"data.shards={described!r}"


def joined(faces: ShardSet, others: ShardSet, share: float = 1) -> Any:
    return join([Part(faces, 1, {}), Part(others, share, NAMES)], None)


def test_a_joined_split_holds_the_images_of_all_sets_by_the_trainings_classes(
    faces: ShardSet, others: ShardSet
) -> None:
    both, first, second = joined(faces, others), faces.split("train"), others.split("train")
    split = both.split("train")
    assert both.class_names == faces.class_names and both.splits == ("train", "val")
    assert len(split) == len(first) + len(second) == sum(both.counts["train"])
    assert np.bincount(split.index["label"], minlength=8).tolist() == list(both.counts["train"])
    reader, plain = Reader(split, 0), Reader(second, 0)
    for k in (0, len(second) - 1):
        sample = len(first) + k
        assert (reader.read(sample) == plain.read(k)).all()
        assert split.key(sample) == f"{others.root}/{second.key(k)}"
        own = second.class_names[second.index["label"][k]]
        assert split.class_names[split.index["label"][sample]] == NAMES.get(own, own)


def test_classes_that_do_not_meet_are_listed(faces: ShardSet, others: ShardSet) -> None:
    with pytest.raises(ValueError) as caught:
        join([Part(faces, 1, {"joy": "happy"}), Part(others, 1, {})], None)
    assert f"{faces.root} has no 'joy'; 'happiness', 'angry' of {others.root} meet no class; " in (
        str(caught.value)
    )
    with pytest.raises(ValueError, match=r"'contempt' of .* meet no class"):
        join([Part(faces, 1, {})], faces.class_names[:7])


@pytest.mark.parametrize("sampling", ["balanced", "shuffle", {"power": 0.5}])
def test_shares_of_sets_and_classes_multiply_and_are_exact_at_every_step(
    faces: ShardSet, others: ShardSet, sampling: Any
) -> None:
    split = joined(faces, others, 0.25).split("train")
    own, is_balanced = shares_of(split, sampling), sampling != "shuffle"
    assert own is not None
    order = TrainOrder(
        split, slice(None), global_batch=13, seed=0, balanced=is_balanced, shares=own
    )
    groups = groups_of(split, by_class=is_balanced)
    present = np.unique(groups)
    assert own.last[present >= (8 if is_balanced else 1)].sum() * 4 == pytest.approx(
        own.last[present < (8 if is_balanced else 1)].sum(), rel=1e-6
    )
    drawn = np.zeros(groups.max() + 1)
    for step in range(5 * order.steps):
        drawn += np.bincount(groups[order(step).ids], minlength=len(drawn))
        assert (np.abs(drawn[present] - (step + 1) * 13 * own.last / own.parts) < 1).all()
    order.close()


def test_explicit_shares_name_every_class(faces: ShardSet) -> None:
    split, names = faces.split("train"), faces.class_names
    own = shares_of(split, {"shares": dict.fromkeys(names, 0) | {"happy": 3, "anger": 1}})
    assert own is not None and sorted(own.last) == [0] * 6 + [1, 3]
    with pytest.raises(ValueError, match="no class 'joy'; there are 'neutral', "):
        shares_of(split, {"shares": {"joy": 1}})
    with pytest.raises(ValueError, match="'contempt' missing; every class has a share, be it 0"):
        shares_of(split, {"shares": dict.fromkeys(names[:7], 1)})
    changing = shares_of(split, {"from": "shuffle", "to": "balanced", "epochs": 4})
    assert changing is not None and changing.epochs == 4
    assert (changing.weights(4) == changing.weights(4)[0]).all()
    assert shares_of(split, "balanced") is None is shares_of(split, "shuffle")


def test_damage_is_each_sets_own(faces: ShardSet, others: ShardSet) -> None:
    split = joined(faces, others).split("train")
    reader, first = Reader(split, max_bad=1), len(faces.split("train"))
    same = np.flatnonzero(groups_of(split) == groups_of(split)[first])
    reader.report(first, "a test's")
    assert (reader.read(first) == reader.read(int(same[1]))).all()  # of its class and set
    reader.report(0, "a test's")
    with pytest.raises(TooMuchDamageError, match="; 2 images of split 'train' are damaged"):
        reader.report(1, "a test's")


@pytest.mark.slow
def test_two_sets_train_resume_to_the_bit_and_are_judged_each(
    tiny: Write, tmp_path: Path, faces: ShardSet, others: ShardSet
) -> None:
    mixed = [sets((faces, 2), (others, 1)), "data.sampling={power: 0.5}", "train.max_steps=8",
             "train.checkpoint_every=3"]  # fmt: skip
    whole = single(tiny("whole"), *mixed)
    single(tiny("parts"), *mixed[:2], "train.max_steps=3")
    again = single(tiny("parts"), *mixed)
    assert again.metrics == whole.metrics
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    found = whole.metrics
    each = [found[f"accuracy_{faces.dataset}"], found["accuracy_others"]]
    assert found["accuracy"] == sum(each) / 2
    with pytest.raises(ValueError, match="a set joins or leaves only in a new run"):
        single(tiny("parts"), f"data.shards={faces.root}", *mixed[1:])
    with pytest.raises(ValueError, match="was trained on other images than"):
        single(tiny("parts"), sets((faces, 2), (others, 2)), *mixed[1:])
    checkpoint = newest_checkpoint(tmp_path / "whole")
    assert checkpoint is not None and checkpoint[1]["class_names"] == list(faces.class_names)


@pytest.mark.slow
def test_sets_from_a_server_and_a_folder_go_through_a_cache(
    tiny: Write, tmp_path: Path, faces: ShardSet, others: ShardSet
) -> None:
    """The same training as from folders, a copy of each set, and each checked by itself."""
    chosen = ["data.sampling={power: 0.5}", "train.max_steps=3"]
    cached = [f"data.cache={tmp_path / 'cache'}", *chosen]
    local = single(tiny("local"), sets((faces, 2), (others, 1)), *chosen, "train.max_steps=5")
    with Server(others.root) as server:
        remote = sets((faces, 2), (others, 1)).replace(str(others.root), server.url)
        single(tiny("remote"), remote, *cached)
        tars = [name for name in server.asked if name.endswith(".tar")]
        assert sorted(tars) == sorted(s.name for own in others.shards.values() for s in own)
        copies = [path.parent for path in (tmp_path / "cache").glob("*/manifest.json")]
        assert {open_shardset(c).fingerprint for c in copies} == {
            faces.fingerprint, others.fingerprint
        }  # fmt: skip
        (copy,) = [c for c in copies if open_shardset(c).dataset == others.dataset]
        (copy / "index-train.npy").write_bytes(b"torn")  # which is copied again
        again = single(tiny("remote"), remote, *cached, "train.max_steps=5")
        assert server.asked.count("index-train.npy") == 2
    assert again.metrics == local.metrics
    a, b = weights(tmp_path / "local"), weights(tmp_path / "remote")
    assert all(torch.equal(a[name], b[name]) for name in a)
    options = EvaluateOptions(
        checkpoint=tmp_path / "remote", data=str(faces.root), cache=str(tmp_path / "cache"),
        device="cpu", no_tracking=True,
    )  # fmt: skip
    found = evaluate(options)
    assert found["images"] == len(faces.split("val"))


def test_several_sets_are_for_expressions(tiny: Write, people: ShardSet) -> None:
    with pytest.raises(ValueError, match="task=identity takes one set"):
        single(
            tiny("run"), "task=identity", "data.sampling=shuffle", sets((people, 1), (people, 1))
        )


def test_the_drawn_faces_and_photographs_train_together(
    tiny: Write, tmp_path: Path, faces: ShardSet
) -> None:
    photographs = REPOSITORY.parent / "shared" / "faces"
    if not photographs.is_dir():
        pytest.skip(f"{photographs} is not there")
    pack(folder.release(photographs), tmp_path / "photographs", size=32, workers=1, shard_size=100)
    both = [{"path": str(faces.root)},
            {"path": str(tmp_path / "photographs"), "classes": {"angry": "anger"}}]  # fmt: skip
    found = single(tiny("run"), f"data.shards={both!r}", "train.max_steps=3").metrics
    assert sum(name.startswith("accuracy_") for name in found) == 2


def test_a_configuration_of_several_sets_is_written_and_read_again(tiny: Write) -> None:
    several = "data.shards=[{path: a, classes: {joy: happy}}, {path: b}]"
    changing = "data.sampling={from: shuffle, to: {power: 0.5}, epochs: 3}"
    config = load_config(tiny("run"), [several, changing])
    assert config.data.paths == ["a", "b"]
    again = tiny("again")
    again.write_text(to_yaml(config))
    assert load_config(again) == config
