"""Networks from files: the authors' DAN gives the authors' logits, and starts a training."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from authors import Reference, State, authors_state
from torch import Tensor

from conftest import DAN as OPTIONS
from conftest import single
from dan_dist.data.loader import evaluation_loader
from dan_dist.evaluation import evaluate as evaluation
from dan_dist.model.backbone import load_backbone
from dan_dist.model.classes import class_order, columns_of
from dan_dist.model.dan import DAN
from dan_dist.model.weights import load_trained, load_weights
from dan_dist.options import EvaluateOptions
from dan_dist.run import checkpoint
from shards.format import ShardSet
from shards.releases import affectnet, rafdb, sfew

Write = Callable[[str], Path]


def batches(faces: ShardSet, split: str) -> Tensor:
    """Faces as the network gets them, (n, 3, 32, 32) in double precision."""
    with evaluation_loader(
        faces.split(split), rank=0, world_size=1, image_size=32, device=torch.device("cpu"),
        threads=1,
    ) as loader:  # fmt: skip
        found = [next(loader) for _ in range(loader.order.steps)]
    return torch.cat([b.images[b.ids >= 0] for b in found]).double()


@pytest.fixture(scope="module")
def authors(faces: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of eight classes and four heads, its BatchNorm settled by a few batches of faces."""
    state = authors_state(8, 4)
    reference = Reference(state, 4)
    reference.settling = True
    for images in batches(faces, "train").split(16):
        reference(images)
    path = tmp_path_factory.mktemp("authors") / "affecnet8_epoch5.pth"
    torch.save({"iter": 5, "model_state_dict": state, "optimizer_state_dict": {}}, path)
    return path


def test_logits_are_those_of_the_equations(authors: Path, faces: ShardSet) -> None:
    state = torch.load(authors, weights_only=True)["model_state_dict"]
    images = batches(faces, "val")
    trained = load_trained(authors)
    with torch.no_grad():
        expected, found = Reference(state, 4)(images), trained.network(images).logits
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    assert expected.argmax(dim=1).unique().numel() > 1
    assert trained.class_names == affectnet.CLASSES and trained.step == 5


@pytest.mark.parametrize(("classes", "heads"), [(7, 1), (7, 2)])
def test_other_sizes_and_wrappers_load(tmp_path: Path, classes: int, heads: int) -> None:
    """Any number of heads, over one of which nothing is normalised; bare tensors; `module.`."""
    state = authors_state(classes, heads)
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "dan.pth")
    trained = load_trained(tmp_path / "dan.pth", "rafdb")
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, found = Reference(state, heads)(images), trained.network(images).logits
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    assert trained.class_names == rafdb.CLASSES


def test_class_orders_are_the_packers() -> None:
    assert class_order("affectnet8") == affectnet.CLASSES
    assert class_order("affectnet7") == affectnet.CLASSES[:7]
    assert class_order("rafdb") == rafdb.CLASSES
    assert class_order("sfew") == tuple(sfew.CLASSES.values())
    assert class_order("glad, mad") == ("glad", "mad")


def as_float32(state: State) -> State:
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def broken(state: State) -> State:
    return {k.replace("cat_head", "head"): v for k, v in state.items()}


@pytest.mark.parametrize(
    ("classes", "change", "order", "line"),
    [
        (7, dict, None, r"does not name its 7 classes: .* affectnet8, affectnet7, rafdb, sfew"),
        (7, dict, "affectnet8", r"has 7 classes, 'affectnet8' has 8"),
        (7, dict, "fer", r"classes 'fer': expected affectnet8, .*, or names with commas"),
        (8, broken, None, r"127 of 255 tensors match; missing or of another shape: "
                          r"cat_head0\.sa\.conv1x1\.0\.weight, .* more; unknown: head0\.ca\."),
        (7, dict, "a,b,c,d,e,f,a", r"a, b, c, d, e, f, a: a name stands there twice"),
        (7, dict, "a,b,c,d,e,f,", r"expected names"),
        (8, lambda state: {**state, "fc.bias": torch.zeros(1).expand(10**8)}, None,
         r"fc\.weight, fc\.bias, bn\.weight"),
        (8, lambda state: {**state, **{f"cat_head{k}.x": torch.ones(1) for k in range(300)}},
         None, r" of \d+ tensors match"),
        (8, lambda state: {**state, "fc.weight": state["fc.weight"].to_sparse()}, None,
         r"shape: fc\.weight; unknown: none"),
        (8, lambda state: {"epoch": 3}, None, r" 0 of \d+ tensors match"),
        (8, lambda state: [1], None, r"holds a list, not tensors by name"),
        (8, lambda state: {**state, "fc.weight": state["fc.weight"][:, :9]}, None,
         r"missing or of another shape: fc\.weight; unknown: none"),
    ],
)  # fmt: skip
def test_another_network_than_the_authors_is_refused(
    tmp_path: Path, classes: int, change: Callable[[State], object], order: str | None, line: str
) -> None:
    torch.save(change(authors_state(classes, 1)), tmp_path / "dan.pth")
    with pytest.raises(ValueError, match=line):
        load_trained(tmp_path / "dan.pth", order)


def own_checkpoint(tmp_path: Path, **changes: object) -> Path:
    """Of ours, with two classes, some of its content changed; None: left out."""
    sections = {"model": {"heads": 0, "image_size": 32}, "data": {"val_split": "val"},
                "train": {"precision": "auto", "output": "runs/x"}, "loss": {"fcn": "none"},
                "tracking": {"experiment": "e"}}  # fmt: skip
    objective = {f"network.{k}": v for k, v in DAN(2, 0).state_dict().items()}
    content = {"format": checkpoint.FORMAT, "step": 3, "config": sections,
               "class_names": ["a", "b"], "objective": objective, **changes}  # fmt: skip
    path = tmp_path / "own.pt"
    checkpoint.save(path, {k: v for k, v in content.items() if v is not None})
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"objective": None}, {"objective": []}, {"objective": {3: torch.ones(2)}},
        {"config": {}}, {"config": [1]}, {"config": {"model": {"heads": "2", "image_size": 32}}},
        {"config": {"model": {"heads": 10**9, "image_size": 32}}},
        {"config": {"model": {"heads": 0, "image_size": 0}}}, {"class_names": [1, 2]},
        {"class_names": ["a", "a"]}, {"class_names": None}, {"step": "x"},
    ],
)  # fmt: skip
def test_our_own_layout_with_other_content_is_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    assert load_trained(own_checkpoint(tmp_path)).class_names == ("a", "b")
    with pytest.raises(ValueError, match=r"own\.pt"):
        load_trained(own_checkpoint(tmp_path, **changes))


def test_checkpoints_with_the_former_names_of_the_weights_of_losses_load(tmp_path: Path) -> None:
    """`loss.lambda_affinity` and `loss.lambda_partition` are lambda_fcn and lambda_afn today."""
    former = {"fcn": "none", "lambda_affinity": 1.0, "lambda_partition": 0.5}
    config = checkpoint.load(own_checkpoint(tmp_path), keys=("config",))["config"]
    trained = load_trained(own_checkpoint(tmp_path, config={**config, "loss": former}))
    assert trained.config["loss"] == former and trained.class_names == ("a", "b")


def test_damage_is_noticed_wherever_weights_are_read(authors: Path, tmp_path: Path) -> None:
    data = bytearray(authors.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    for name in ("flipped.pth", "cut.pth"):
        source = str(tmp_path / name)
        for read in (load_backbone, lambda n, s: load_weights(n, affectnet.CLASSES, s)):
            with pytest.raises(ValueError, match=rf"^model\.\w+ .*{name}: not a readable"):
                read(DAN(8, 4), source)


def test_classes_are_found_by_name() -> None:
    assert columns_of(("a", "b", "c"), ("c", "a", "b")) == [2, 0, 1]
    assert columns_of(rafdb.CLASSES, affectnet.CLASSES[:7]) == [6, 3, 4, 0, 1, 2, 5]
    assert columns_of(tuple(sfew.CLASSES.values()), rafdb.CLASSES) == [6, 2, 1, 3, 5, 0, 4]
    assert columns_of(("a", "b"), ("a", "c")) is None
    both = ("happy", "happiness", "sad")  # apart in this data set: no synonyms
    assert columns_of(both, both) == [0, 1, 2]
    assert columns_of(both, ("happy", "happy", "sad")) is None


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    for zipped in (True, False):  # the two formats of torch.save
        torch.save({"model_state_dict": Harmful()}, tmp_path / "dan.pth",
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        with pytest.raises(ValueError, match=r"dan\.pth: not a "):
            load_trained(tmp_path / "dan.pth")
    assert not (tmp_path / "executed").exists()


def test_files_of_older_torch_load(authors: Path, tmp_path: Path) -> None:
    content = torch.load(authors, weights_only=True)
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old, new = load_trained(tmp_path / "old.pth"), load_trained(authors)
    assert torch.equal(old.network.classifier.weight, new.network.classifier.weight)


def test_the_authors_backbone_starts_ours(authors: Path) -> None:
    network, state = DAN(7, 2), torch.load(authors, weights_only=True)["model_state_dict"]
    assert "100 tensors" in load_backbone(network, str(authors))
    found = network.backbone.get_parameter("layer4.1.conv2.weight")
    assert torch.equal(found, state["features.7.1.conv2.weight"].float())


def test_the_classifier_follows_the_names(authors: Path) -> None:
    """AffectNet's weights under the classes in another order, and under RAF-DB's."""
    state = torch.load(authors, weights_only=True)["model_state_dict"]
    turned = ("contempt", "angry", *affectnet.CLASSES[:6])
    network = DAN(8, 4)
    assert "classifier and all" in load_weights(network, turned, str(authors))
    rows = [7, 6, 0, 1, 2, 3, 4, 5]
    assert torch.equal(network.classifier.weight, state["fc.weight"][rows].float())
    assert torch.equal(network.logit_norm.running_mean, state["bn.running_mean"][rows].float())
    network = DAN(7, 4)
    fresh = network.classifier.weight.clone()
    assert "classifier: fresh" in load_weights(network, rafdb.CLASSES, str(authors))
    assert torch.equal(network.classifier.weight, fresh)
    square = network.get_parameter("heads.3.spatial.square.0.weight")
    assert torch.equal(square, state["cat_head3.sa.conv_3x3.0.weight"].float())
    with pytest.raises(ValueError, match=r"has 4 heads, model\.heads is 2"):
        load_weights(DAN(8, 2), affectnet.CLASSES, str(authors))
    with pytest.raises(ValueError, match=r"has width 64, model\.width is 32"):
        load_weights(DAN(8, 4, width=32), affectnet.CLASSES, str(authors))


@pytest.mark.slow
def test_a_training_starts_from_it(
    authors: Path, tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One step of next to nothing leaves the weights; without the file, the run goes on."""
    state = torch.load(authors, weights_only=True)
    torch.save(state, start := tmp_path / "start.pth")
    options = [f"model.weights={start}", "model.heads=4", *OPTIONS[1:], "optim.lr=1e-30",
               "train.precision=float64", "model.width=64"]  # fmt: skip
    caplog.set_level("INFO")
    single(tiny("run"), *options, "train.max_steps=1")
    assert f"network: from {start}, classifier and all" in caplog.text
    objective = checkpoint.load(tmp_path / "run" / "best.pt")["objective"]
    for key, ours in (("fc.weight", "classifier.weight"), ("features.0.weight",
                      "backbone.conv1.weight"), ("cat_head3.sa.conv_1x3.0.weight",
                      "heads.3.spatial.wide.0.weight")):  # fmt: skip
        expected = state["model_state_dict"][key].float().double()
        assert torch.equal(objective[f"network.{ours}"], expected), key
    start.unlink()
    assert single(tiny("run"), *options, "train.max_steps=2").status == "finished"
    with pytest.raises(FileNotFoundError, match=r"model\.weights .*start\.pth: no such checkpoint"):
        single(tiny("other"), *options)


def test_a_dan_from_a_baseline(
    baseline_run: Path, tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second of two stages: the backbone is the baseline's, the heads are new."""
    caplog.set_level("INFO")
    start = f"model.backbone={baseline_run / 'best.pt'}"
    single(tiny("run"), *OPTIONS, start, "optim.backbone_lr=0", "train.max_steps=2")
    assert str(baseline_run / "best.pt") in caplog.text
    trunk, dan = (checkpoint.load(run / "best.pt")["objective"]
                  for run in (baseline_run, tmp_path / "run"))  # fmt: skip
    learned = [name for name in trunk if ".backbone." in name and name.endswith("weight")]
    assert len(learned) == 40 and any("heads" in name for name in dan)
    assert all(torch.equal(trunk[name], dan[name]) for name in learned)


@pytest.mark.slow
def test_evaluated_under_classes_in_another_order(authors: Path, faces: ShardSet) -> None:
    """The same network with its classes named in another order: as many are right."""
    state = torch.load(authors, weights_only=True)
    rows = [7, 6, 5, 4, 3, 2, 1, 0]
    ending = [k for k in state["model_state_dict"] if re.match(r"(fc|bn)\.", k)]
    for key in ending:
        if state["model_state_dict"][key].ndim:
            state["model_state_dict"][key] = state["model_state_dict"][key][rows]
    torch.save(state, turned := authors.with_name("turned.pth"))
    order = ",".join(reversed(affectnet.CLASSES))
    first, second = (
        evaluation.main(EvaluateOptions(checkpoint=path, data=str(faces.root), classes=classes,
                                        no_tracking=True))
        for path, classes in ((authors, None), (turned, order))
    )  # fmt: skip
    assert first["confusion_matrix"] == second["confusion_matrix"]
    assert first["classes"] == second["classes"] and first["images"] == 16
