"""What lies beside an exported network: a model card, and an example that runs without torch."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from dan_dist.data.holdout import HELD_OUT
from dan_dist.evaluation.intervals import METHOD, Interval, intervals, wilson
from dan_dist.evaluation.judge import WHOLE
from dan_dist.evaluation.metrics import confusion
from dan_dist.evaluation.records import PREDICTIONS, read_predictions
from dan_dist.evaluation.result import read_result
from dan_dist.model.dan import WIDTH
from dan_dist.model.weights import Trained
from dan_dist.run.checkpoint import BEST
from shards.command import escape, words
from shards.cut import BOX, SIMILARITY, parse_cut
from shards.format import DRAWN

EXAMPLE = '''\
"""python {stem}-example.py FACE.jpg …  needs pip install onnxruntime pillow numpy"""
import json, pathlib, sys, numpy, onnxruntime
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession(str(pathlib.Path(__file__).with_name("{stem}.onnx")))
facts = session.get_modelmeta().custom_metadata_map
names, size = json.loads(facts["class_names"]), [int(facts["size"])] * 2
for path in sys.argv[1:]:
    face = ImageOps.exif_transpose(Image.open(path)).convert("RGB").resize(size, Image.BILINEAR)
    row = session.run(None, {{"pixels": numpy.asarray(face, "f4").transpose(2, 0, 1)[None]}})[1][0]
    print(path, names[row.argmax()], {{n: round(float(p), 4) for n, p in zip(names, row)}})
'''

RESEARCH, OWN_PAGE = "on application, for non-commercial research", "see the data set's own page"
TERMS = {  # of data sets, by the names that `shards.pack` gives them
    "AffectNet-7": RESEARCH,
    "AffectNet-8": RESEARCH,
    "RAF-DB": RESEARCH,
    "RAF-DB compound": RESEARCH,
    "SFEW 2.0": RESEARCH,
    "FER-2013": OWN_PAGE,
    "FERPlus": f"labels under the MIT licence; images of FER-2013, {OWN_PAGE}",
    "ExpW": OWN_PAGE,
    "CAER-S": OWN_PAGE,
    DRAWN: "drawn by this project, free",
}

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
  among them (MS-Celeb-1M, of the paper's recipes, is for non-commercial research):
{licences}
"""

log = logging.getLogger(__name__)


class _Looked(BaseModel):
    """What the card tells of a run's result on its test split (`evaluation.result`)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    split: str
    weights_of_step: int
    fingerprint: str
    images: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    intervals_method: str
    looks: list[Any]


def write_card(trained: Trained, stem: str, opset: int) -> str:
    """The model card of an exported network, as Markdown."""
    config, heads = trained.config, len(trained.network.heads)
    fusion = {"mean": "the mean", "log_softmax": "the sum of the log-softmax"}[
        trained.network.fusion
    ]
    narrow = "" if trained.network.width == WIDTH else f" of width {trained.network.width}"
    ending = f" and {heads} attention heads, fused by {fusion}" if heads else ""
    return CARD.format(
        name=trained.name,
        stem=stem,
        opset=opset,
        size=trained.image_size,
        count=len(trained.class_names),
        classes=", ".join(trained.class_names),
        network=f"ResNet-18{narrow}{ending}",
        cut=describe_cut(trained.face_cut),
        checkpoint=trained.path.name,
        length=f"{trained.step} {'optimiser steps' if config else 'epochs'}",
        run=f", MLflow run {trained.run_id}" if trained.run_id else "",
        protocol=describe_protocol(trained),
        results=describe_results(trained),
        licences=describe_licences(trained.facts.get("sets", ())),
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
    train = trained.config["train"]
    sets = ", ".join(trained.facts.get("sets", ())) or "a set that the file does not name"
    start = trained.config["model"].get("weights") or trained.config["model"].get("backbone")
    lines: tuple[str, ...] = (
        f"Trained on split `train` of {sets}, fingerprint `{trained.facts.get('fingerprint')}`,",
        f"for {train.get('epochs')} epochs in batches of {train.get('global_batch')}, seed",
        f"{train.get('seed')}; start of the weights: `{start}`.",
    )
    if trained.path.name == BEST:
        lines += (f"The checkpoint is that of the best epoch on {_judges(trained)}: its accuracy",
                  "there chose it, and is higher than on images that chose nothing.")  # fmt: skip
    return escape(" ".join(lines))


def _judges(trained: Trained) -> str:
    """The images of the training's own evaluations, in words."""
    if trained.selected_on == HELD_OUT:
        return "images held out of `train`"
    return f"split `{trained.config['data']['val_split']}`"


def describe_licences(sets: Sequence[str]) -> str:
    """A line on the terms of each data set that a checkpoint names, as `NAME (fingerprint)`."""
    lines = []
    for own in sets:
        name = own.rpartition(" (")[0] or own
        first, _, number = name.rpartition("-")  # the second set of a name has a number
        terms = TERMS.get(name) or (number.isdigit() and TERMS.get(first)) or "not known here"
        lines.append(f"  - {escape(name)}: {terms}")
    return "\n".join(lines or ["  - the file does not name its images: not known here"])


def describe_results(trained: Trained) -> str:
    """The training's own evaluation of the checkpoint and its look at the test split.

    With 95 % intervals, as far as the checkpoint and the files beside it hold what they need.
    """
    if trained.facts.get("other_weights"):
        return "None: the training has evaluated the average of its weights, and these are others."
    found = filter(None, (_own_results(trained), _test_results(trained)))
    return "\n\n".join(found) or "The file does not name any."


def _own_results(trained: Trained) -> str:
    facts = trained.facts.get("best" if trained.path.name == BEST else "evaluation", {})
    figures = {name: value for name, value in facts.items() if name != "epoch"}
    if "accuracy" not in figures:
        return ""
    is_of_sets = isinstance(trained.config["data"].get("shards"), list)
    found = {} if is_of_sets else _own_intervals(trained, figures["accuracy"])
    lines = [f"Of the training's own evaluation of this checkpoint, on {_judges(trained)}:", "",
             *_table(figures, found)]  # fmt: skip
    if missing := [name.replace("_", " ") for name in WHOLE if name in {*figures} - {*found}]:
        reason = "the predictions of this evaluation are not kept"
        if is_of_sets:
            reason = "each is the mean over several sets"
        lines += ["", f"Without an interval: {', '.join(missing)}, as {reason}."]
    return "\n".join([*lines, *(("", f"Intervals: {METHOD}.") if found else ())])


def _own_intervals(trained: Trained, accuracy: float) -> dict[str, Interval]:
    """Of an evaluation on one set."""
    matrix, images = _own_confusion(trained), trained.facts.get("images")
    if matrix is not None:
        return intervals(matrix, trained.class_names)
    if not images or not 0 <= accuracy <= 1:
        return {}
    return {"accuracy": wilson(round(accuracy * images), images)}


def _own_confusion(trained: Trained) -> NDArray[Any] | None:
    """Of the predictions beside the checkpoint, if they are of its own evaluation."""
    is_held_out = trained.selected_on == HELD_OUT
    wanted = {
        "split": HELD_OUT if is_held_out else trained.config["data"]["val_split"],
        "step": trained.step,
        "fingerprint": trained.facts.get("fingerprint"),
        "class_names": list(trained.class_names),
    }
    try:
        found = read_predictions(trained.path.parent / PREDICTIONS)
        if not wanted.items() <= found.facts.items():
            return None
        labels = [trained.class_names.index(name) for name in found.labels.tolist()]
    except (ValueError, OSError):
        return None
    return confusion(found.probabilities, np.array(labels))


def _test_results(trained: Trained) -> str:
    """Of the test split, where the run has looked at it with these weights."""
    try:
        known = read_result(trained.path.parent)
        result = _Looked.model_validate(known) if known else None
    except (ValueError, OSError) as error:
        log.warning("the card is without the result on the test split: %s", words(error))
        return ""
    own = (trained.step, trained.facts.get("fingerprint"))
    if result is None or (result.weights_of_step, result.fingerprint) != own:
        return ""
    looks = "once" if len(result.looks) == 1 else f"{len(result.looks)} times"
    head = (
        f"Of the test split `{escape(result.split)}` ({result.images} images), which chose nothing"
    )
    return "\n".join([f"{head}, looked at {looks}, after training:", "",
                      *_table(result.metrics, result.intervals), "",
                      f"Intervals: {escape(result.intervals_method)}."])  # fmt: skip


def _table(figures: Mapping[str, float], found: Mapping[str, Sequence[float]]) -> list[str]:
    rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in figures.items():
        interval = " to ".join(f"{100 * end:.2f}" for end in found.get(name, ()))
        rows.append(f"| {escape(name)} | {100 * value:.2f} % | {interval} |")
    return rows
