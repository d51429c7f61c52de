"""Exports a checkpoint for use elsewhere: launch/export.py CHECKPOINT [--output FOLDER]

Writes CHECKPOINT.onnx and CHECKPOINT.pt2 (torch.export): BatchNorms folded, each head's parallel
convolutions merged into one, any number of images at once, normalisation within, class names in the
metadata. Both are checked against the network, and timed beside it on the CPU.
"""

import argparse
from pathlib import Path

from dan_dist.entry import add_checkpoint, run
from dan_dist.stop import StopRequest


def main(arguments: list[str], stop: StopRequest) -> int:
    """Exports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, help="folder; default: the checkpoint's")
    options = parser.parse_args(arguments)

    from dan_dist import export

    export.main(options.checkpoint, classes=options.classes, output=options.output)
    return 0


if __name__ == "__main__":
    run(main)
