"""Selection apart from judgement: what is held out, what chooses, and that the test split waits."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ranks import ranks
from trees import replace_index

from conftest import copied, history, outcome, single, train
from dan_dist.config import load_config
from dan_dist.data.holdout import RELEASE_GROUPS, deal, hold_out, image_groups
from dan_dist.data.mixture import Part, join
from dan_dist.data.splits import open_splits, selected_on
from dan_dist.evaluation import evaluate as evaluation
from dan_dist.evaluation.records import PREDICTIONS, read_predictions
from dan_dist.evaluation.result import RESULT
from dan_dist.options import EvaluateOptions
from dan_dist.run import checkpoint
from dan_dist.run.plan import make_plan
from shards.duplicates import duplicate_groups
from shards.format import INDEX_DTYPE, ShardSet, Split, open_shardset
from shards.index import soft_of, with_groups
from shards.packing.writer import pack
from shards.releases import synthetic
from shards.releases.sfew import film_of

Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Faces as `faces` has them, with a test split of 24 more; each two happy ones are a group."""
    release = synthetic.release(80, 16, size=32, seed=7)
    others = synthetic.release(8, 24, size=32, seed=9).splits["val"]
    folder = tmp_path_factory.mktemp("tested") / "shards"
    pack(replace(release, splits={**release.splits, "test": others}), folder, size=32, workers=1)
    for split in ("train", "val", "test"):
        index = open_shardset(folder).split(split).index
        own, happy = np.arange(len(index)), index["label"] == 1
        replace_index(folder, with_groups(index, np.where(happy, own // 2, 100 + own)), split)
    return open_shardset(folder)


def split_of(labels: NDArray[np.int64], marks: NDArray[np.int64] | None = None) -> Split:
    """A split of an index alone; equal marks are equal images."""
    index = np.zeros(len(labels), INDEX_DTYPE)
    index["label"] = labels
    index["crc32"] = np.arange(len(labels)) if marks is None else marks
    names = tuple(f"c{k}" for k in range(int(labels.max()) + 1))
    return Split("train", Path("x"), (), index, names, 32)


def test_each_class_gives_its_share_and_folds_cover_all_once() -> None:
    counts = (360, 100, 47, 10)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    none = np.arange(len(labels))
    held = deal(labels, none, [0.1, 0.9], seed=3) == 0
    assert np.bincount(labels[held]).tolist() == [36, 10, 5, 1]
    assert (held == (deal(labels, none, [0.1, 0.9], seed=3) == 0)).all()
    assert (held != (deal(labels, none, [0.1, 0.9], seed=4) == 0)).any()
    folds = deal(labels, none, [0.2] * 5, seed=3)
    for k in range(5):
        own = np.bincount(labels[folds == k], minlength=4)
        assert (abs(own - np.array(counts) / 5) < 1).all()


@pytest.mark.parametrize("shares", [[0.2, 0.8], [0.25] * 4])
def test_groups_stay_on_one_side(shares: list[float]) -> None:
    """Films of 1 to 40 images of several classes: no group is torn, shares are met nearly."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 2000)
    groups = np.concatenate([rng.integers(0, 60, 800), 60 + np.arange(1200)])
    parts = deal(labels, groups, shares, seed=0)
    for group in range(60):
        assert len(set(parts[groups == group].tolist())) <= 1
    for k, share in enumerate(shares):
        own = np.bincount(labels[parts == k], minlength=5) / np.bincount(labels)
        assert (abs(own - share) < 0.02).all(), own


def test_equal_images_and_films_are_groups(
    faces: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = np.array([7, 8, 7, 9, 9, 10])
    groups = duplicate_groups(split_of(np.zeros(6, int), marks).index)
    assert (groups[:, None] == groups).tolist() == (marks[:, None] == marks).tolist()
    films = {"happy_AlexEmma_001208574_00000004": "AlexEmma", "angry_Bad_Santa_00_1": "Bad_Santa"}
    assert {key: film_of(key) for key in films} == films
    split = faces.split("train")
    monkeypatch.setitem(RELEASE_GROUPS, "synthetic", lambda key: key[-1])
    films = [split.key(k)[-1] for k in range(len(split))]
    found = image_groups(faces, split).tolist()
    assert len(set(zip(films, found, strict=True))) == len(set(films)) == len(set(found))
    index = np.array(split.index)
    index[1] = index[0]  # an image that stands in two films makes them one group
    joined = image_groups(faces, replace(split, index=index)).tolist()
    assert joined[0] == joined[1]


def test_photographs_that_a_pack_recorded_stand_on_one_side(
    tested: ShardSet, faces: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    """A set without such groups says so in a line; drawn faces are not looked at."""
    pairs = 0
    for seed in range(20):
        sides = hold_out(tested, tested.split("train"), [0.3, 0.7], 0, seed, "data.holdout")
        kept, held = (set(side.index["group"].tolist()) for side in sides)
        assert not kept & held
        pairs += len(sides[1]) - len(held)
    assert pairs > 20 * 4
    both = join([Part(tested, 1, {}), Part(faces, 1, {}), Part(tested, 1, {})], None)
    groups = image_groups(both, both.split("train"))
    own = len(np.unique(tested.split("train").index["group"]))
    assert (groups.reshape(3, 80) == groups[:80]).all()  # they are the same bytes
    assert len(np.unique(groups)) == own < 80  # and no more than these: numbers are each set's
    assert "recorded no groups" not in caplog.text
    former = replace(faces, dataset="folder")
    hold_out(former, former.split("train"), [0.3, 0.7], 0, 0, "data.holdout")
    assert caplog.text.count(f"{faces.root}: its pack recorded no groups of one photograph") == 1


def test_a_set_of_each_has_its_own_share(faces: ShardSet) -> None:
    both = join([Part(faces, 1, {}), Part(replace(faces, dataset="other"), 1, {})], None)
    split = both.split("train")
    kept, held = hold_out(both, split, [0.3, 0.7], 0, 0, "data.holdout")
    assert len(kept) + len(held) == 160 and held.name == "holdout"
    assert kept.ends[-1] == len(kept) and held.ends[-1] == len(held)  # type: ignore[attr-defined]
    rows = {tuple(row) for row in kept.index.tolist()}
    assert not rows & {tuple(row) for row in held.index.tolist()}


def test_dry_runs_outline_is_cut_too() -> None:
    """A set that is not here has no checksums: its images are no duplicates of each other."""
    from dan_dist.dry_run import Outline

    outline = Outline(Path("x"), "d", "r", ("a", "b"), 32, "", {"train": (20, 10)}, {"train": ()},
                      {}, {}, {}, None, is_soft=True)  # fmt: skip
    assert soft_of(outline.split("train").index).tolist() == [[1, 0]] * 20 + [[0, 1]] * 10
    many = replace(outline, counts={"train": (5,) * 80_000}, is_soft=False)  # shares: 128 GB
    assert soft_of(many.split("train").index) is None
    kept, held = hold_out(outline, outline.split("train"), [0.1, 0.9], 0, 0, "data.holdout")
    assert np.bincount(held.index["label"]).tolist() == [2, 1] and len(kept) == 27


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["data.holdout=0.01"], r"data\.holdout leaves class '\w+', of which there are \d+ .* out"),
        (["data.holdout=0.97"], r"data\.holdout leaves class '\w+', .*image to train on"),
        (["data.fold=1/40"], r"data\.fold leaves class '\w+'"),
        (["data.fold=6/5"], r"data\.fold is '6/5', expected k/n with 1 ≤ k ≤ n and n ≥ 2"),
        (["data.fold=0/5"], r"data\.fold is '0/5'"),
        (["data.fold=1/1"], r"data\.fold is '1/1'"),
        (["data.fold=1/5", "data.holdout=0.2"], r"data\.fold: data\.holdout is given already"),
        (["data.holdout=1.0"], r"data\.holdout is 1\.0"),
        (["data.test_split=train"], r"data\.test_split is 'train', expected a split without"),
        (["data.test_split=val"], r"data\.test_split is 'val', on which the best epoch is chosen"),
        (["data.test_split=test"], r"no split 'test', it has train, val"),
        (["data.protocol=paper", "data.test_split=test"], r"data\.protocol: paper chooses on the"),
        (["data.protocol=paper", "data.holdout=0.1"], r"data\.protocol: paper chooses on the"),
        (["train.select=f1"], r"train\.select is 'f1'"),
        (["task=identity", "data.holdout=0.1"], r"data\.holdout must be null"),
    ],
)  # fmt: skip
def test_bad_choices_are_one_line(
    faces: ShardSet, tiny: Write, words: list[str], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        config = load_config(tiny("run"), words)
        open_splits(faces, config.data, config.train.seed)


def test_what_chose_is_named() -> None:
    val, test = {"val_split": "val"}, {"val_split": "test"}
    assert selected_on(val) == "val" and selected_on(test) == "test"
    assert selected_on({**val, "protocol": "paper"}) == "test"
    assert selected_on({**test, "holdout": 0.1}) == selected_on({**val, "fold": "1/2"}) == "holdout"


def test_patience_ends_a_run() -> None:
    base = "data: {shards: x}\ntrain: {epochs: 9, global_batch: 10, output: x, patience: 2}\n"
    Path("run.yaml").write_text(base)
    plan = make_plan(load_config("run.yaml"), images=30, start=0)
    ends = [plan.is_over(step, best_epoch=2) for step in (6, 9, 11, 12, 15)]
    assert ends == [False, False, False, True, True]
    assert not plan.is_over(12, best_epoch=None) and plan.is_over(27, best_epoch=9)


OPENED: list[list[str]] = []  # of the paths that are opened while a list stands here


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and OPENED:
        OPENED[-1].append(str(arguments[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    if not getattr(sys, "_opened_here", False):
        sys.addaudithook(_audit)  # can not be taken away again
        sys._opened_here = True  # type: ignore[attr-defined]
    OPENED.append([])
    yield OPENED[-1]
    OPENED.clear()


@pytest.mark.slow
def test_the_test_split_is_opened_after_the_last_epoch(
    tested: ShardSet, tiny: Write, tmp_path: Path, opened: list[str], store: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One look with the best weights, as launch/evaluate.py has it; an extended run counts two."""
    caplog.set_level("INFO")
    words = [f"data.shards={tested.root}", "data.holdout=0.3", "data.test_split=test",
             "train.select=macro_f1", "tracking.enabled=true"]  # fmt: skip
    run = tmp_path / "run"
    ended = single(tiny("run"), *words)
    tars = [k for k, path in enumerate(opened) if re.search(r"shards/test-.*\.tar$", path)]
    last = max(k for k, path in enumerate(opened) if re.search(r"step-0+14\.pt", path))
    assert tars and min(tars) > last  # the last checkpoint is on the disk before
    result = json.loads((run / RESULT).read_text())
    assert ended.test == result and result["selected_on"] == "holdout" and result["images"] == 24
    assert "looked at once" in caplog.text and "selected_on holdout" in caplog.text
    found = outcome(run)["result"]
    best = checkpoint.load(run / checkpoint.BEST)["best"]["epoch"]
    assert found == {"split": "test", "selected_on": "holdout", "looks": 1, "epoch": best} | {
        k: v for k, v in result["metrics"].items() if "/" not in k
    }
    assert history(store, "test/accuracy") == [(14, result["accuracy"])]
    options = EvaluateOptions(checkpoint=run, data=str(tested.root), no_tracking=True)
    report = evaluation.main(options)
    assert report["split"] == "test" and report["accuracy"] == result["accuracy"]
    assert report["selected_on"] == "holdout"
    predictions = read_predictions(run / PREDICTIONS)
    assert predictions.right.mean() == result["accuracy"]
    assert predictions.keys.tolist() == [*tested.split("test").keys()]

    opened.clear()
    assert single(tiny("run"), *words).test == result  # has ended already: no other look
    assert not [path for path in opened if re.search(r"shards/test-.*\.tar$", path)]
    longer = single(tiny("run"), *words, "train.epochs=3")
    assert [look["step"] for look in longer.test["looks"]] == [14, 21]
    assert outcome(run)["result"]["looks"] == 2 and "look 2" in caplog.text


@pytest.mark.slow
def test_two_ranks_look_as_one(tested: ShardSet, tiny: Write, tmp_path: Path) -> None:
    words = [f"data.shards={tested.root}", "data.test_split=test", "train.max_steps=1"]
    printed = train(2, tiny("run"), *words, cwd=tmp_path)
    assert "looked at once), selected_on val" in printed
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    options = EvaluateOptions(checkpoint=tmp_path / "run", data=str(tested.root),
                              no_tracking=True)  # fmt: skip
    report = evaluation.main(options)
    assert report["images"] == result["images"] == 24
    assert report["accuracy"] == result["accuracy"] and report["intervals"] == result["intervals"]


def held(root: str, seed: int) -> list[int]:
    """What a rank holds out, as the offsets of its images."""
    from dan_dist.distributed.heartbeat import session

    with session("cpu", timeout_s=60.0, on_loss=lambda line: None):
        shards = open_shardset(root)
        _, own = hold_out(shards, shards.split("train"), [0.3, 0.7], 0, seed, "data.holdout")
        return own.index["offset"].tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_holds_out_the_same(tested: ShardSet, size: int) -> None:
    expected = hold_out(tested, tested.split("train"), [0.3, 0.7], 0, 5, "data.holdout")[1]
    for own in ranks(size, held, str(tested.root), 5):
        assert own == expected.index["offset"].tolist()


@pytest.mark.slow
def test_a_resumed_run_holds_out_the_same_and_ends_by_patience(
    tested: ShardSet, tiny: Write, tmp_path: Path
) -> None:
    """At a learning rate of nothing no epoch is better: the second ends the run."""
    words = [f"data.shards={tested.root}", "data.fold=2/2", "train.epochs=5", "optim.lr=1e-30",
             "model.width=64"]  # fmt: skip
    single(tiny("one"), *words, "train.patience=2")
    assert outcome(tmp_path / "one")["reason"] == "no better epoch in 2 epochs"
    assert outcome(tmp_path / "one")["result"]["selected_on"] == "holdout"
    one = read_predictions(tmp_path / "one" / PREDICTIONS)
    single(tiny("two"), *words, "train.max_steps=3")
    again = copied(tmp_path / "two", tmp_path / "three")
    single(tiny("three"), *words, "train.patience=2")
    two, three = (read_predictions(p / PREDICTIONS) for p in (tmp_path / "two", again))
    assert one.keys.tolist() == two.keys.tolist() == three.keys.tolist()
    assert one.facts["split"] == "holdout" and outcome(again)["status"] == "finished"
    with pytest.raises(ValueError, match=r"data\.fold was '2/2', is '1/2'"):
        single(tiny("three"), *words, "data.fold=1/2")
