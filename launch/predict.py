"""Says what faces express: launch/predict.py CHECKPOINT IMAGE|FOLDER… [--json]

Each image is taken for the crop of one face, as training's are; in a whole photograph, find and cut
out the faces first. Prints each image's class and all classes' probabilities.
"""

import argparse
import sys
from pathlib import Path

from dan_dist.entry import FAILED, add_checkpoint, run
from dan_dist.stop import StopRequest


def main(arguments: list[str], stop: StopRequest) -> int:
    """Predicts; returns the exit code: 1 where an image could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_checkpoint(parser)
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders of them")
    parser.add_argument("--json", action="store_true", help="a line of JSON an image")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bf16", "float64"), default="auto",
        help="default: that of the training",
    )  # fmt: skip
    options = parser.parse_args(arguments)

    from dan_dist import prediction

    print("each image is taken for the crop of one face", file=sys.stderr)
    unread = prediction.main(
        options.checkpoint,
        options.images,
        classes=options.classes,
        as_json=options.json,
        device=options.device,
        precision=options.precision,
    )
    return FAILED if unread else 0


if __name__ == "__main__":
    run(main)
