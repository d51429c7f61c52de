"""Looks inside: launch/explain.py CHECKPOINT [IMAGE|FOLDER…] [--data SHARDS] [--against CHECKPOINT]

Where each attention head looks (Grad-CAM++), on the faces of a split or on images that are given,
and how much the heads overlap; with shards, also how the features of their classes lie (t-SNE).
Figures and explanation.json go into a folder beside the checkpoint, and into MLflow.
"""

import argparse
from pathlib import Path

from dan_dist.entry import FAILED, add_checkpoint, run
from dan_dist.stop import StopRequest


def main(arguments: list[str], stop: StopRequest) -> int:
    """Explains; returns the exit code: 1 where an image could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_checkpoint(parser)
    parser.add_argument(
        "images", type=Path, nargs="*", help="crops of one face each, or folders of them"
    )
    parser.add_argument("--data", help="folder or URL of shards")
    parser.add_argument("--split", help="default: that of the training's own evaluations")
    parser.add_argument("--cache", help="folder into which the shards are copied")
    parser.add_argument("--against", type=Path, help="another checkpoint, to be set beside it")
    parser.add_argument("--count", type=int, default=8, help="faces in the figure (default 8)")
    parser.add_argument("--output", type=Path, help="default: a folder beside the checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--experiment", help="MLflow's; default: that of the training")
    parser.add_argument("--no-tracking", action="store_true", help="leave MLflow out")
    options = parser.parse_intermixed_args(arguments)

    from dan_dist import explanation

    report = explanation.main(
        options.checkpoint,
        options.images,
        data=options.data,
        split=options.split,
        cache=options.cache,
        against=options.against,
        classes=options.classes,
        count=options.count,
        output=options.output,
        device=options.device,
        experiment=options.experiment,
        tracked=not options.no_tracking,
    )
    return FAILED if report["unread"] else 0


if __name__ == "__main__":
    run(main)
