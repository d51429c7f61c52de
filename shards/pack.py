"""python -m shards.pack DATASET --source DIR --out DIR: a release, as downloaded, into shards.

DATASET: affectnet, rafdb, sfew, folder, identities or synthetic; `merge` ends a pack in parts.
"""

from shards import command

if __name__ == "__main__":  # before numpy is imported: a signal may come meanwhile
    command.pack()

import argparse
import logging
import re
from functools import partial
from pathlib import Path

from shards.format import open_shardset
from shards.packing.writer import SHARD_SIZE, merge, pack
from shards.release import Release
from shards.releases import affectnet, folder, identities, rafdb, sfew, synthetic
from shards.releases.source import plain_name
from shards.show import draw_overview, table


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for bad input, in one line)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("shards").setLevel(logging.INFO)
    return command.guarded(partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    if options.dataset == "merge":
        merge(options.out)
    elif _pack(options) is None:
        part, parts = options.part
        print(f"part {part} of {parts} is packed; when all are: python -m shards.pack "
              f"merge --out {plain_name(options.out)}")  # fmt: skip
        return 0
    shards = open_shardset(options.out)
    draw_overview(shards)
    print(plain_name(f"{table(shards)}\npacked into {options.out}"))
    return 0


def _pack(options: argparse.Namespace) -> Path | None:
    """The manifest; None: there are other parts to pack, then to merge."""
    return pack(
        _release(options), options.out,
        size=options.size, workers=options.workers, shard_size=options.shard_size,
        overwrite=options.overwrite, part=options.part,
    )  # fmt: skip


def _release(options: argparse.Namespace) -> Release:
    """The data set that the command names, as its module in shards/releases lists it."""
    match options.dataset:
        case "affectnet":
            return affectnet.release(
                options.source, classes=options.classes, size=options.size, margin=options.margin
            )
        case "rafdb":
            return rafdb.release(options.source)
        case "sfew":
            return sfew.release(options.source, landmarks=options.landmarks, size=options.size)
        case "identities":
            return identities.release(options.source, options.held_out)
        case "synthetic" if options.by == "identity":
            return synthetic.identity_release(
                options.train, options.val, identities=options.identities,
                held_out=options.held_out, size=options.size, seed=options.seed,
            )  # fmt: skip
        case "synthetic":
            return synthetic.release(
                options.train, options.val, size=options.size, seed=options.seed
            )
        case _:
            return folder.release(options.source)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.pack", description=__doc__)
    kinds = parser.add_subparsers(dest="dataset", required=True)
    sources = {
        name: kinds.add_parser(name, help=text)
        for name, text in {
            "affectnet": "AffectNet, the reduced or the full release",
            "rafdb": "RAF-DB's basic set",
            "sfew": "SFEW 2.0, aligned faces or film frames",
            "folder": "train/<class>/*, val/<class>/* and further splits",
            "identities": "<identity>/<image>, as MS-Celeb-1M",
        }.items()
    }
    for kind in sources.values():
        kind.add_argument("--source", required=True, help="the release's folder")
        kind.add_argument(
            "--size", type=_size, default=224, help="pixels, or 'native' (default 224)"
        )
    sources["affectnet"].add_argument("--classes", type=int, choices=(7, 8), default=8)
    sources["affectnet"].add_argument(
        "--margin", type=_fraction, default=0.0,
        help="around the full release's face boxes, of their size, on each side (default 0)",
    )  # fmt: skip
    sources["sfew"].add_argument("--landmarks", help="the file that python -m shards.align wrote")
    sources["identities"].add_argument(
        "--held-out", type=int,
        help="identities kept out of training, for verification (default: a tenth, 20 to 1000)",
    )  # fmt: skip
    faces = kinds.add_parser("synthetic", help="drawn faces of eight expressions")
    faces.add_argument("--by", choices=("expression", "identity"), default="expression",
                       help="what the classes are (default expression)")  # fmt: skip
    faces.add_argument("--train", type=int, default=8000, help="training images (default 8000)")
    faces.add_argument("--val", type=int, default=800, help="validation images (default 800)")
    faces.add_argument("--size", type=int, default=64, help="pixels (default 64)")
    faces.add_argument("--seed", type=int, default=0)
    faces.add_argument("--identities", type=int, default=400,
                       help="by identity: persons in training (default 400)")  # fmt: skip
    faces.add_argument("--held-out", type=int, default=40,
                       help="by identity: other persons, in validation (default 40)")  # fmt: skip
    merging = kinds.add_parser("merge", help="ends a pack that was made in parts")
    for kind in (*sources.values(), faces, merging):
        kind.add_argument("--out", required=True, help="the folder for the shards")
    for kind in (*sources.values(), faces):
        kind.add_argument("--workers", type=int, default=0, help="processes (default: all cores)")
        kind.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="images a shard")
        kind.add_argument("--overwrite", action="store_true", help="replace shards in --out")
        kind.add_argument(
            "--part", type=_part, default=(1, 1), metavar="I/N",
            help="pack one part of N, on several machines at once; then merge",
        )  # fmt: skip
    return parser


def _size(text: str) -> int | None:
    if text != "native" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be pixels or 'native', got {text!r}")
    return None if text == "native" else int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"expected 0 to 2, got {text}")
    return value


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected I/N, as 1/8, got {text!r}")
    return int(found[1]), int(found[2])
