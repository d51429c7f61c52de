"""A trained network for use elsewhere: merged into fewer operations, as ONNX and `torch.export`."""

import copy
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dan_dist.data.augment import MEAN, STD
from dan_dist.inference.card import EXAMPLE, write_card
from dan_dist.model.dan import DAN, SpatialAttention
from dan_dist.model.weights import Trained, load_trained
from dan_dist.options import ExportOptions
from dan_dist.run.checkpoint import disk_error
from dan_dist.run.folder import check_writable
from shards.command import words
from shards.files import write_atomically

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the largest logit
TORCHS_OPSET = 18  # that torch's exporter writes, from which onnx converts to others
TIMED_BATCH, REPEATS = 8, 9


class MergedSpatialAttention(nn.Module):
    """`SpatialAttention` in evaluation: its parallel convolutions and BatchNorms as one 3×3."""

    def __init__(self, attention: SpatialAttention) -> None:
        super().__init__()
        self.reduce = fuse_conv_bn_eval(*attention.reduce)
        square, wide, tall = (
            fuse_conv_bn_eval(*branch)
            for branch in (attention.square, attention.wide, attention.tall)
        )
        with torch.no_grad():  # convolution is linear: the kernels add up where they lie
            square.weight[:, :, 1:2, :] += wide.weight
            square.weight[:, :, :, 1:2] += tall.weight
            square.bias += wide.bias + tall.bias
        self.mixed = square

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.mixed(self.reduce(x)))
        return x * y.sum(dim=1, keepdim=True)


def merge(network: DAN) -> DAN:
    """A copy of a network in evaluation mode with the same output and fewer operations.

    BatchNorms are folded into what stands before them, each head's parallel convolutions become
    one: exact but for rounding. It cannot be trained.
    """
    merged = copy.deepcopy(network).eval()
    trunk: Any = merged.backbone  # torchvision's modules are not typed
    _fold(trunk, "conv1", "bn1")
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for block in stage:
            _fold(block, "conv1", "bn1")
            _fold(block, "conv2", "bn2")
            if block.downsample is not None:
                block.downsample = fuse_conv_bn_eval(*block.downsample)
    head: Any
    for head in merged.heads:
        head.spatial = MergedSpatialAttention(head.spatial)
        linear, norm, *rest = head.channel.gate
        head.channel.gate = nn.Sequential(fuse_linear_bn_eval(linear, norm), *rest)
    if isinstance(merged.logit_norm, nn.BatchNorm1d):
        merged.classifier = fuse_linear_bn_eval(merged.classifier, merged.logit_norm)
        merged.logit_norm = nn.Identity()
    return merged.requires_grad_(False)


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
    setattr(module, conv, fused)
    setattr(module, norm, nn.Identity())


class Classifier(nn.Module):
    """What is exported: pixels (B,3,S,S) float32, RGB 0 … 255 → logits, probabilities (B,C)."""

    def __init__(self, network: DAN) -> None:
        super().__init__()
        self.network = network
        self.mean = nn.Buffer(255 * torch.tensor(MEAN).view(1, 3, 1, 1))
        self.std = nn.Buffer(255 * torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network((pixels - self.mean) / self.std).logits
        return logits, logits.softmax(dim=1)


def main(options: ExportOptions) -> list[Path]:
    """Exports a checkpoint as ONNX and as `torch.export`, and checks both against it.

    Returns the files, `<checkpoint>.onnx` and `<checkpoint>.pt2`: any number of images at once,
    normalisation within; class names and sizes stand in their metadata. Beside them lie a model
    card and an example that runs without torch.

    Raises:
        ValueError, OSError: bad input, an export that does not give the network's logits, or the
            packages that it needs are not installed.
    """
    require_libraries()
    trained = load_trained(options.checkpoint, options.classes, weights=options.weights)
    output = options.output or trained.path.parent
    check_writable(output, "--output")
    size, plain = trained.image_size, Classifier(trained.network.float()).eval()
    merged = Classifier(merge(plain.network)).eval()
    log.info("exporting %s: %d px, %d classes", trained.path, size, len(trained.class_names))
    example, batch = torch.rand(2, 3, size, size) * 255, torch.export.Dim("batch", min=1)
    program = torch.export.export(merged, (example,), dynamic_shapes=({0: batch},))
    files = [output / f"{trained.path.stem}.{kind}" for kind in ("onnx", "pt2")]
    partial = [file.with_name(f"{file.stem}.partial{file.suffix}") for file in files]
    try:
        write(program, partial[0], partial[1], describe(trained), options.opset)
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "network": lambda x: plain(x)[0],
            "merged": lambda x: merged(x)[0],
            "torch.export": load_program(partial[1]),
            "ONNX Runtime": load_onnx(partial[0], options.opset),
        }
        check(forms, size)
        for before, after in zip(partial, files, strict=True):
            before.replace(after)
    finally:
        for file in partial:
            file.unlink(missing_ok=True)
    stem = trained.path.stem
    for name, text in ((f"{stem}-card.md", write_card(trained, stem, options.opset)),
                       (f"{stem}-example.py", EXAMPLE.format(stem=stem))):  # fmt: skip
        write_atomically(output / name, text)
        files.append(output / name)
    compare_speed(forms, size)
    for file in files:
        log.info("%s: %.1f MB", file, file.stat().st_size / 1e6)
    return files


def require_libraries() -> None:
    """Imports what only an export needs, which takes seconds."""
    try:
        for name in ("onnx", "onnxruntime", "onnxscript"):  # torch's exporter needs the last one
            import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is missing: exporting needs the packages of pip install -e '.[export]'"
        ) from error


def describe(trained: Trained) -> dict[str, Any]:
    """The metadata of the files, plain values."""
    return {
        "class_names": list(trained.class_names),
        "input": "pixels: (batch, 3, size, size) float32, RGB face crops, 0 to 255",
        "size": trained.image_size,
        "mean": MEAN,
        "std": STD,
        "normalization": "(pixels / 255 - mean) / std, inside the graph",
        "output": "logits, probabilities: (batch, classes) float32",
        "checkpoint": trained.path.name,
        "step": trained.step,
        "run_id": trained.run_id or "",
    }


def write(
    program: torch.export.ExportedProgram, onnx: Path, exported: Path, facts: dict[str, Any],
    opset: int,
) -> None:  # fmt: skip
    """Writes a program in both formats, with its metadata."""
    try:
        write_onnx(program, onnx, facts, opset)
        torch.export.save(program, exported, extra_files={"metadata.json": json.dumps(facts)})
    except (OSError, RuntimeError) as error:  # torch's writer makes one of a full disk's
        raise disk_error(error, onnx.parent) from error


def load_onnx(path: Path, opset: int) -> Callable[[Tensor], Tensor]:
    """The logits of pixels by a file of ONNX; ValueError: ONNX Runtime does not read this opset."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own errors share no base but Exception
        version = onnxruntime.__version__
        raise ValueError(f"--opset {opset}: ONNX Runtime {version} does not read the file "
                         f"({words(error)})") from error  # fmt: skip
    return lambda x: torch.from_numpy(session.run(["logits"], {"pixels": x.numpy()})[0])


def load_program(path: Path) -> Callable[[Tensor], Tensor]:
    """The logits of pixels by a file of `torch.export`."""
    module = torch.export.load(path).module()
    return lambda x: module(x)[0]


def plain_log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The log-softmax by steps of one shape, which OpenCV 4.8 computes as they stand.

    Its own log-softmax is the logarithm of a softmax, which may be 0; the logarithm of a sum of
    exponentials it takes for log(1 + exp x), but not that of their mean.
    """
    parts = x.unbind(dim)
    largest = reduce(torch.maximum, parts)
    mean = reduce(torch.add, [(part - largest).exp() for part in parts]) / len(parts)
    shift = largest + mean.log() + math.log(len(parts))
    return torch.stack([part - shift for part in parts], dim)


def plain_sum(x: Tensor, dim: list[int], *others: Any, **options: Any) -> Any:
    """The sum over heads of (B, k, D) by steps; OpenCV 4.8 sums over another axis."""
    return reduce(torch.add, x.unbind(dim[0])) if x.ndim == 3 else NotImplemented


def plain_mean(x: Tensor, dim: list[int], *others: Any, **options: Any) -> Any:
    """The mean over heads, as `plain_sum`."""
    return plain_sum(x, dim) / x.size(dim[0]) if x.ndim == 3 else NotImplemented


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, facts: dict[str, Any], opset: int
) -> None:
    """One self-contained ONNX file; `facts` are its metadata, lists as JSON.

    Its format's version is the lowest that holds the opset: older runtimes refuse a newer one.
    """
    import onnx
    from onnx import helper

    by_steps: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.log_softmax.int: plain_log_softmax,
        torch.ops.aten.sum.dim_IntList: plain_sum,
        torch.ops.aten.mean.dim: plain_mean,
    }
    exported = torch.onnx.export(
        program.run_decompositions(by_steps),
        input_names=["pixels"],
        output_names=["logits", "probabilities"],
        dynamic_shapes=({0: "batch"},),
        opset_version=TORCHS_OPSET,
        verbose=False,
    )
    assert exported is not None
    model = at_opset(exported.model_proto, opset)
    helper.set_model_props(
        model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    )
    onnx.save(model, path)


def at_opset(model: Any, opset: int) -> Any:
    """A model as torch's exporter gives it, by the operators of another version, checked.

    Raises:
        ValueError: the installed onnx does not know the version, or cannot convert to it.
    """
    import onnx
    from onnx import helper, version_converter

    try:
        if opset != TORCHS_OPSET:
            model = version_converter.convert_version(model, opset)
        model.ir_version = helper.find_min_ir_version_for(model.opset_import)
        for node in model.graph.node:
            node.ClearField("metadata_props")  # where its line of Python lies
            # The converter leaves what 18 added.
            if node.op_type in ("ReduceMean", "ReduceMax") and opset < 18:
                kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
                del node.attribute[:]
                node.attribute.extend(kept)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the converter's and the checker's share no base but Exception
        raise ValueError(f"--opset {opset}: onnx {onnx.__version__} cannot write it "
                         f"({words(error)})") from error  # fmt: skip
    return model


@torch.no_grad()
def check(forms: dict[str, Callable[[Tensor], Tensor]], size: int) -> None:
    """Compares each form's logits with the first's on noise, for one image and for several.

    Logits that are further apart than TOLERANCE of the largest one are a ValueError.
    """
    random = torch.Generator().manual_seed(0)
    (_, network), *others = forms.items()
    for images in (1, 3):
        pixels = torch.rand(images, 3, size, size, generator=random) * 255
        expected = network(pixels)
        for name, form in others:
            error = float((form(pixels) - expected).abs().max() / expected.abs().max())
            if not error < TOLERANCE:
                raise ValueError(
                    f"{name}: logits are {error:.1e} of the largest off, at most {TOLERANCE} is "
                    "tolerated; nothing was written"
                )
            log.info("%s: %d images, largest difference %.1e of the largest logit",
                     name, images, error)  # fmt: skip


@torch.no_grad()
def compare_speed(forms: dict[str, Callable[[Tensor], Tensor]], size: int) -> None:
    """Logs each form's time on the CPU, beside the first one's; repeats interleave."""
    pixels = torch.rand(TIMED_BATCH, 3, size, size) * 255
    times_ms: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(REPEATS + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            form(pixels)
            if repeat:  # the first warms up
                times_ms[name].append(1e3 * (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        log.info("%-12s %7.1f ms for %d images on this CPU, %.2f times as fast as the network",
                 name, median, TIMED_BATCH, first / median)  # fmt: skip
