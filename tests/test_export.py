"""A trained network exported: merged, as ONNX and torch.export, with its card and example."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx as onnx_format
import onnxruntime
import pytest
import torch
from test_docs import FENCED
from test_use import crop_files
from torch import nn

from conftest import LAUNCH, REPOSITORY, run, shared
from dan_dist.data.augment import MEAN, STD
from dan_dist.inference import export
from dan_dist.inference.card import EXAMPLE
from dan_dist.model.dan import DAN, Output
from dan_dist.model.weights import load_trained
from dan_dist.options import ExportOptions
from shards.format import ShardSet
from shards.images import decode

SIDE = 64  # pixels


def settled(heads: int, **options: Any) -> DAN:
    """A network whose BatchNorms all do something."""
    torch.manual_seed(heads)
    network = DAN(8, heads, width=16, **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for _ in range(10):
            network.train()(torch.randn(4, 3, SIDE, SIDE))
    return network.eval()


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_the_merged_network_is_the_network(heads: int) -> None:
    network, images = settled(heads).double(), torch.randn(4, 3, 64, 64).double()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    merged = export.merge(network)
    with torch.no_grad():
        found, expected = merged(images), network(images)
    for part in range(len(Output._fields)):
        if expected[part] is not None:
            largest = expected[part].abs().max()
            assert (found[part] - expected[part]).abs().max() < 1e-9 * largest
    kinds = [type(module) for module in merged.modules()]
    assert not any("BatchNorm" in kind.__name__ for kind in kinds)
    assert sum(kind is nn.Conv2d for kind in kinds) == 20 + 2 * heads
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def written(network: DAN, path: Path, opset: int) -> Path:
    """A network as a file of ONNX."""
    batch = torch.export.Dim("batch", min=1)
    pixels = torch.rand(2, 3, SIDE, SIDE) * 255
    whole = export.Classifier(export.merge(network)).eval()
    program = torch.export.export(whole, (pixels,), dynamic_shapes=({0: batch},))
    export.write_onnx(program, path, {}, opset)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "fusion", "opsets"),
    [(0, "log_softmax", (17, 19)), (2, "mean", (17, 21)), (3, "log_softmax", (18, 24))],
)
def test_every_opset_and_fusion_gives_the_networks_logits(
    tmp_path: Path, heads: int, fusion: str, opsets: tuple[int, ...]
) -> None:
    """In ONNX Runtime; in OpenCV too, whose reader knows the operators of the default."""
    network = settled(heads, fusion=fusion)
    exporters = onnx_format.load(written(network, tmp_path / "18.onnx", export.TORCHS_OPSET))
    pixels = np.random.default_rng(heads).uniform(0, 255, (3, 3, SIDE, SIDE)).astype("f4")
    with torch.no_grad():
        expected = export.Classifier(network).eval()(torch.from_numpy(pixels))[0].numpy()
    for opset in opsets:
        onnx = tmp_path / f"{opset}.onnx"
        onnx_format.save(export.at_opset(exporters, opset), onnx)
        check_header(onnx, opset)
        found = [export.load_onnx(onnx, opset)(torch.from_numpy(pixels)).numpy()]
        if opset == 17:
            other = cv2.dnn.readNetFromONNX(str(onnx))
            other.setInput(pixels[:1])
            found.append(other.forward("logits"))
        for logits in found:
            error = np.abs(logits - expected[: len(logits)]).max()
            assert error < export.TOLERANCE * np.abs(expected).max()


def test_an_opset_that_is_not_known_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the converter, or to ONNX Runtime alone, as a newer onnx would write it."""
    model = onnx_format.helper.make_model(
        onnx_format.helper.make_graph([], "nothing", [], []),
        opset_imports=[onnx_format.helper.make_opsetid("", export.TORCHS_OPSET)],
    )
    with pytest.raises(ValueError, match=r"--opset 999: onnx [\d.]+ cannot write it \(.+\)$"):
        export.at_opset(model, 999)
    model.opset_import[0].version = 998
    (tmp_path / "n.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"--opset 998: ONNX Runtime [\d.]+ does not read the"):
        export.load_onnx(tmp_path / "n.onnx", 998)


def check_header(onnx: Path, opset: int) -> None:
    """Others than the newest read the file: opset, version, and a batch axis by its name."""
    model = onnx_format.load(onnx)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert opset > 17 or model.ir_version == 8  # what ONNX Runtime 1.15 reads at most is 9
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b"dan_dist/" not in onnx.read_bytes()  # no path of this machine


@pytest.fixture
def exported(dan_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documented command writes of `dan_run`; made once a session."""

    def make(folder: Path) -> None:
        folder.mkdir()
        words = (sys.executable, LAUNCH / "export.py", dan_run, "--output", folder)
        done = run(*words, cwd=dan_run.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "times as fast as the network" in done.stdout

    return shared(tmp_path_factory, "exported", make)


@pytest.mark.slow
def test_exported_files_give_the_networks_logits(
    dan_run: Path, exported: Path, faces: ShardSet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    network, out = load_trained(dan_run).network, exported
    onnx, program = out / "best.onnx", out / "best.pt2"
    card, example = out / "best-card.md", out / "best-example.py"
    assert set(out.iterdir()) == {onnx, program, card, example}
    for part in ("Wilson", "split `val`", faces.fingerprint, "Intended use", "Licences",
                 "opset 17"):  # fmt: skip
        assert part in card.read_text()
    check_header(onnx, 17)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    extra = {"metadata.json": ""}
    module = torch.export.load(program, extra_files=extra).module()
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == list(faces.class_names)
    assert json.loads(facts["size"]) == 32 and json.loads(facts["mean"]) == list(MEAN)
    assert json.loads(extra["metadata.json"])["class_names"] == list(faces.class_names)
    paths = crop_files(faces, tmp_path / "crops")
    other = cv2.dnn.readNetFromONNX(str(onnx))
    other.setInput(noise := np.random.default_rng(0).uniform(0, 255, (1, 3, 32, 32)).astype("f4"))
    assert np.allclose(other.forward("logits"), session.run(["logits"], {"pixels": noise})[0],
                       atol=1e-4)  # fmt: skip
    alone = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; "
    alone += "runpy.run_path(sys.argv[0])"
    done = run(sys.executable, "-I", "-c", alone, example, *paths[:2], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    pixels = np.stack([np.asarray(decode(p.read_bytes())) for p in paths]).transpose(0, 3, 1, 2)
    scaled = (pixels / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        logits = network(torch.from_numpy(scaled).float()).logits
    for line, path, row in zip(lines, paths, logits, strict=False):
        assert line.startswith(f"{path} {faces.class_names[int(row.argmax())]} {{")
    assert len(lines) == 2
    for images in (1, 16):
        given, expected = pixels[:images].astype(np.float32), logits[:images]
        both = session.run(["logits", "probabilities"], {"pixels": given})
        for found in (both, module(torch.from_numpy(given))):
            error = np.abs(np.asarray(found[0]) - expected.numpy()).max()
            assert error < 1e-4 * expected.abs().max()
            assert np.allclose(np.asarray(found[1]), expected.softmax(dim=1), atol=1e-5)

    def spoilt(network: DAN) -> DAN:
        with torch.no_grad():
            network.classifier.bias[3] += 0.01
        return network

    exact = export.merge
    monkeypatch.setattr(export, "merge", lambda network: spoilt(exact(network)))
    with pytest.raises(ValueError, match=r"merged: logits are .* off, at most 0\.0001"):
        export.main(ExportOptions(checkpoint=dan_run, output=tmp_path / "spoilt"))
    assert not list((tmp_path / "spoilt").iterdir())


def install(folder: Path) -> Path:
    """The Python of a new environment of what the example needs, and nothing else; or skips."""
    packages = ("onnxruntime", "pillow", "numpy")
    python = folder / "bin" / "python"
    if uv := shutil.which("uv"):
        commands = [[uv, "venv", "--python", sys.executable, folder],
                    [uv, "pip", "install", "--python", python, *packages]]  # fmt: skip
    else:
        venv.create(folder, with_pip=True)
        commands = [[python, "-m", "pip", "install", *packages]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"needs PyPI: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
def test_the_example_predicts_where_three_packages_are_all_there_is(
    dan_run: Path, exported: Path, faces: ShardSet, tmp_path: Path
) -> None:
    python, paths = install(tmp_path / "venv"), crop_files(faces, tmp_path / "crops")[5:9]
    done = run(python, "-I", "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in done.stderr
    done = run(python, "-I", exported / "best-example.py", *paths, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pixels = np.stack([np.asarray(decode(p.read_bytes())) for p in paths]).transpose(0, 3, 1, 2)
    whole = export.Classifier(load_trained(dan_run).network).eval()
    with torch.no_grad():
        labels = whole(torch.from_numpy(pixels).float())[0].argmax(dim=1).tolist()
    lines = done.stdout.splitlines()
    for line, path, label in zip(lines, paths, labels, strict=True):
        assert line.startswith(f"{path} {faces.class_names[label]} {{")


def test_the_example_has_ten_lines() -> None:
    assert len(EXAMPLE.splitlines()) == 10


def test_a_checkpoint_is_a_module_in_the_documented_lines(
    dan_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "launch" / "README.md").read_text()
    (code,) = [own for kind, own in FENCED.findall(text) if kind == "python" and "load_tr" in own]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "affectnet8").symlink_to(dan_run)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    network = names["network"]
    assert isinstance(network, nn.Module) and not network.training
    assert network(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 8)
