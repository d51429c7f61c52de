"""What lies beside an exported network: a model card, and an example that runs without torch."""

from collections.abc import Mapping
from typing import Any

from scipy.stats import binomtest

from dan_dist.data.holdout import HELD_OUT
from dan_dist.model.weights import Trained
from dan_dist.run.checkpoint import BEST
from shards.command import escape
from shards.cut import BOX, SIMILARITY, parse_cut

EXAMPLE = '''\
"""python {stem}-example.py FACE.jpg …  needs pip install onnxruntime pillow numpy"""
import json, pathlib, sys
import numpy, onnxruntime
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession(str(pathlib.Path(__file__).with_name("{stem}.onnx")))
facts = session.get_modelmeta().custom_metadata_map
names, size = json.loads(facts["class_names"]), int(facts["size"])
for path in sys.argv[1:]:
    face = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    face = face.resize((size, size), Image.Resampling.BILINEAR)
    pixels = numpy.asarray(face, numpy.float32).transpose(2, 0, 1)[None]
    row = session.run(["probabilities"], {{"pixels": pixels}})[0][0]
    print(path, names[row.argmax()], {{n: round(float(p), 4) for n, p in zip(names, row)}})
'''

CARD = """\
# {name}: facial expressions by DAN

Classifies the crop of one face into {count} classes: {classes}.

| | |
|---|---|
| files | `{stem}.onnx` (opset {opset}), `{stem}.pt2` (torch.export), `{stem}-example.py` |
| input | `pixels` (batch, 3, {size}, {size}) float32, RGB, 0 to 255; normalised within |
| output | `logits`, `probabilities` (batch, {count}) float32, classes in the order above |
| faces | {cut} |
| network | {network} |
| checkpoint | `{checkpoint}`, {length}{run} |

## Data and protocol

{protocol}

## Results

{results}

## Intended use

- Research on facial expressions, on crops cut as those of the training data. In a photograph, faces
  have to be found and cut out first.
- Not for decisions about persons. Emotion recognition at work and in education is prohibited in the
  European Union (Regulation 2024/1689, article 5), with exceptions for medicine and safety.

## Limits of expression recognition

- An expression is not an emotion: the network names what annotators would call a face, not what a
  person feels.
- Annotators of in-the-wild data sets disagree on a large part of the images, and classes that are
  rare in training are recognised worse than the mean.
- Accuracy differs with age, skin, gender, pose, light and the way that faces are cut. It was not
  measured for such groups here.
- Probabilities are the network's own, not calibrated. Every image gets a class, also one without a
  face.

## Licences

- The code: MIT.
- The weights follow the terms of the images that they were trained on, a pre-trained backbone's
  among them. AffectNet, RAF-DB, SFEW and MS-Celeb-1M are for non-commercial research; drawn faces
  are free.
"""


def write_card(trained: Trained, stem: str, opset: int) -> str:
    """The model card of an exported network, as Markdown."""
    config, heads = trained.config, len(trained.network.heads)
    fusion = {"mean": "the mean", "log_softmax": "the sum of the log-softmax"}[
        trained.network.fusion
    ]
    network = "ResNet-18" + (f" and {heads} attention heads, fused by {fusion}" if heads else "")
    return CARD.format(
        name=trained.name,
        stem=stem,
        opset=opset,
        size=trained.image_size,
        count=len(trained.class_names),
        classes=", ".join(trained.class_names),
        network=network,
        cut=describe_cut(trained.face_cut),
        checkpoint=trained.path.name,
        length=f"{trained.step} {'optimiser steps' if config else 'epochs'}",
        run=f", MLflow run {trained.run_id}" if trained.run_id else "",
        protocol=describe_protocol(trained),
        results=describe_results(trained),
    )


def describe_cut(face_cut: str | None) -> str:
    """How the training's faces were cut out of photographs, and so how others have to be."""
    if face_cut is None:
        return "how they were cut out of photographs is not known"
    cut = parse_cut(face_cut)
    if cut.kind == BOX:
        margin = f"with {cut.margin:g} of their size more" if cut.margin else "without a margin"
        return f"cut out by their boxes, {margin} on each side"
    if cut.kind == SIMILARITY:
        return "aligned by five landmarks to the 112-pixel template of ArcFace"
    return "cut out by the makers of the data set"


def describe_protocol(trained: Trained) -> str:
    """What it was trained on and how it was chosen, as far as its file names that."""
    if not trained.config:
        return "The file does not name them."
    data, train = trained.config["data"], trained.config["train"]
    sets = ", ".join(trained.facts.get("sets", ())) or "a set that the file does not name"
    start = trained.config["model"].get("weights") or trained.config["model"].get("backbone")
    lines: tuple[str, ...] = (
        f"Trained on split `train` of {sets}, fingerprint `{trained.facts.get('fingerprint')}`,",
        f"for {train.get('epochs')} epochs in batches of {train.get('global_batch')}, seed",
        f"{train.get('seed')}; start of the weights: `{start}`.",
    )
    if trained.path.name == BEST:
        where = f"split `{data['val_split']}`"
        if trained.selected_on == HELD_OUT:
            where = "images held out of `train`"
        lines += (f"The checkpoint is that of the best epoch on {where}: its accuracy there chose",
                  "it, and is higher than on images that chose nothing.")  # fmt: skip
    return escape(" ".join(lines))


def describe_results(trained: Trained) -> str:
    """The training's own evaluation of the checkpoint, with Wilson's interval of the accuracy."""
    own = "best" if trained.path.name == BEST else "evaluation"
    found: Mapping[str, Any] = trained.facts.get(own, {})
    if "accuracy" not in found:
        return "The file does not name any."
    images = trained.facts.get("images")
    rows = ["| metric | value |", "|---|---|"]
    values = ((name, value) for name, value in found.items() if name != "epoch")
    rows += [f"| {name} | {100 * value:.2f} % |" for name, value in values]
    lines = ["Of the training's own evaluation of this checkpoint:", "", *rows]
    if images and 0 <= found["accuracy"] <= 1:
        right = round(found["accuracy"] * images)
        low, high = binomtest(right, images).proportion_ci(method="wilson")
        lines += ["", f"The accuracy's 95 % interval over {images} images is {100 * low:.2f} to "
                  f"{100 * high:.2f} % (Wilson)."]  # fmt: skip
    return "\n".join(lines)
