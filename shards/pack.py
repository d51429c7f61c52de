"""python -m shards.pack folder|synthetic --out DIR: packs a data set into shards."""

import argparse
import logging
import signal
import sys
from pathlib import Path

from dan_dist.shardset import open_shardset
from shards import folder, synthetic
from shards.writer import CONTACT_SHEET, SHARD_SIZE, pack


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for bad input, in one line)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: worker processes end too
    try:
        if options.dataset == "folder":
            release = folder.release(options.source)
        else:
            release = synthetic.release(
                options.train, options.val, size=options.size, seed=options.seed
            )
        pack(
            release,
            options.out,
            size=options.size,
            workers=options.workers,
            shard_size=options.shard_size,
            overwrite=options.overwrite,
        )
        if options.dataset == "synthetic":
            sheet = Path(options.out) / CONTACT_SHEET
            synthetic.contact_sheet(sheet, size=options.size, seed=options.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        return 130
    print(summary(options.out))
    return 0


def summary(out: str | Path) -> str:
    """A table of images by class and split."""
    shards = open_shardset(out)
    width = max(map(len, (*shards.class_names, "class")))
    lines = ["class".ljust(width) + "".join(f"{s:>10}" for s in shards.splits)]
    for label, name in enumerate(shards.class_names):
        lines.append(
            name.ljust(width) + "".join(f"{shards.counts[s][label]:>10}" for s in shards.splits)
        )
    lines.append(
        "all".ljust(width) + "".join(f"{sum(shards.counts[s]):>10}" for s in shards.splits)
    )
    return "\n".join([*lines, f"packed into {out}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.pack", description=__doc__)
    kinds = parser.add_subparsers(dest="dataset", required=True)
    tree = kinds.add_parser("folder", help="train/<class>/*, val/<class>/* and further splits")
    tree.add_argument("--source", required=True, help="the folder that holds train/ and val/")
    tree.add_argument("--size", type=_size, default=224, help="pixels, or 'native' (default 224)")
    faces = kinds.add_parser("synthetic", help="drawn faces of eight expressions")
    faces.add_argument("--train", type=int, default=8000, help="training images (default 8000)")
    faces.add_argument("--val", type=int, default=800, help="validation images (default 800)")
    faces.add_argument("--size", type=int, default=64, help="pixels (default 64)")
    faces.add_argument("--seed", type=int, default=0)
    for command in (tree, faces):
        command.add_argument("--out", required=True, help="the folder for the shards")
        command.add_argument(
            "--workers", type=int, default=0, help="processes (default: all cores)"
        )
        command.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="images a shard")
        command.add_argument("--overwrite", action="store_true", help="replace shards in --out")
    return parser


def _size(text: str) -> int | None:
    if text != "native" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be pixels or 'native', got {text!r}")
    return None if text == "native" else int(text)


if __name__ == "__main__":
    sys.exit(main())
