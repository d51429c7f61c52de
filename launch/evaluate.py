"""Evaluates a checkpoint: [torchrun] launch/evaluate.py CHECKPOINT --data SHARDS [--split val]

Every image of the split is counted once on any number of ranks. Accuracy, mean recall, each
class's precision, recall and F1, the confusion matrix, calibration and the surest mistakes go into
evaluation.json and figures beside the checkpoint, and into MLflow.
"""

import argparse
from pathlib import Path

from dan_dist.entry import add_checkpoint, run
from dan_dist.stop import StopRequest


def main(arguments: list[str], stop: StopRequest) -> int:
    """Evaluates on this rank; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_checkpoint(parser)
    parser.add_argument("--data", required=True, help="folder or URL of the shards")
    parser.add_argument("--split", help="default: that of the training's own evaluations")
    parser.add_argument("--cache", help="folder on each node into which the shards are copied")
    parser.add_argument("--output", type=Path, help="default: a folder beside the checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bf16", "float64"), default="auto",
        help="default: that of the training",
    )  # fmt: skip
    parser.add_argument("--experiment", help="MLflow's; default: that of the training")
    parser.add_argument("--no-tracking", action="store_true", help="leave MLflow out")
    options = parser.parse_args(arguments)

    from dan_dist import evaluation

    evaluation.main(
        options.checkpoint,
        options.data,
        split=options.split,
        classes=options.classes,
        cache=options.cache,
        output=options.output,
        device=options.device,
        precision=options.precision,
        experiment=options.experiment,
        tracked=not options.no_tracking,
    )
    return 0


if __name__ == "__main__":
    run(main)
