"""Evaluates a checkpoint: [torchrun] launch/evaluate.py CHECKPOINT --data SHARDS [--split val]

Every image of the split is counted once on any number of ranks. Accuracy, mean recall, each
class's precision, recall and F1, the confusion matrix, calibration and the surest mistakes go into
evaluation.json and figures beside the checkpoint, and into MLflow. A network trained on identities
is judged by pairs of images instead: how well its features tell whether they show one person.
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
    parser.add_argument(
        "--pairs", type=int, help="of images, drawn to judge a network trained on identities "
        "(default: as many as in the training's own evaluations)",
    )  # fmt: skip
    parser.add_argument("--pairs-file", help="a file that lists them, LFW's pairs.txt for one")
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
        pairs=options.pairs,
        pairs_file=options.pairs_file,
    )
    return 0


if __name__ == "__main__":
    run(main)
