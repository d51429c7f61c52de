"""What MLflow holds of a run's origin: the images that it is computed on, and its program."""

import sys
from dataclasses import replace

import pytest

from dan_dist.data.holdout import hold_out
from dan_dist.data.mixture import Part, join
from dan_dist.tracking.inputs import dataset_inputs
from dan_dist.tracking.provenance import provenance
from shards.format import ShardSet


def test_a_part_of_a_split_has_a_digest_of_its_own(faces: ShardSet) -> None:
    """And the fingerprint of the set, by which runs are found; several sets, each its own."""
    both = join([Part(faces, 1, {}), Part(replace(faces, dataset="other"), 1, {})], None)
    digests = set[str]()
    for share, seed in ((0.3, 0), (0.3, 1), (0.5, 0)):
        for shards in (faces, both):
            split = shards.split("train")
            kept, held = hold_out(shards, split, [share, 1 - share], 0, seed, "data.holdout")
            found = dataset_inputs(shards, {"train": kept, "val": held}, "here")
            assert {own["fingerprint"] for own in found} == {faces.fingerprint}
            assert sum(own["profile"]["num_rows"] for own in found) == len(split)
            assert len(found) == (2 if shards is faces else 4)
            assert all(own["digest"] for own in found)
            digests |= {own["digest"] for own in found if shards is faces}
    assert len(digests) == 3 * 2
    whole = dataset_inputs(both, {"val": both.split("val")}, "here")
    assert [own["digest"] for own in whole] == ["", ""]
    assert whole[0] == dataset_inputs(faces, {"val": faces.split("val")}, str(faces.root))[0]


def test_where_a_run_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, name in (
        (["python", "-u", "-m", "dan_dist", "evaluate", "x", "-m"], "-m dan_dist evaluate"),
        (["python", "-m", "dan_dist.tracking", "replay", "x"], "-m dan_dist.tracking"),
        (["python", "dan_dist", "train"], "-m dan_dist"),
    ):
        monkeypatch.setattr(sys, "orig_argv", given)
        monkeypatch.setattr(sys, "argv", ["/somewhere/dan_dist/__main__.py", "x"])
        assert provenance()["mlflow.source.name"] == name
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "x"])
    assert provenance()["mlflow.source.name"] == "launch/train.py"
