"""python -m shards.pack DATASET --source DIR --out DIR: a release, as downloaded, into shards.

DATASET: affectnet, rafdb, sfew, fer2013, ferplus and others (--help); `merge` ends a pack in parts.
"""

from shards import command

if __name__ == "__main__":  # before numpy is imported: a signal may come meanwhile
    command.pack()

import argparse
import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from shards.cut import EXPECTED, MOST_MARGIN, parse_cut
from shards.duplicates import describe_duplicates
from shards.format import DRAWN, ShardSet, open_shardset
from shards.leaks import describe_leaks, recorded_leaks, without_leaks
from shards.limits import core_count
from shards.packing.plan import MOST_COMPARED
from shards.packing.pool import worker_count
from shards.packing.writer import SHARD_SIZE, merge, pack
from shards.release import Release
from shards.releases import (
    affectnet,
    caers,
    expw,
    fer2013,
    ferplus,
    folder,
    identities,
    rafdb,
    sfew,
    splitting,
    synthetic,
)
from shards.releases.source import FOLLOW, LEADS_OUT, Source, plain_name
from shards.show import draw_overview, table

MOST_PIXELS = 4096  # of a packed image's side
log = logging.getLogger(__name__)


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
    repeated = [*describe_duplicates(shards), *_leaks(shards)]
    print(plain_name("\n".join([table(shards), f"packed into {options.out}", *repeated])))
    return 0


def _pack(options: argparse.Namespace) -> Path | None:
    """The manifest; None: there are other parts to pack, then to merge."""
    release = _release(options)
    if getattr(options, "drop_leaks", False):
        release = without_leaks(release, options.size, options.workers or core_count())
    return pack(
        release, options.out,
        size=options.size, workers=options.workers, shard_size=options.shard_size,
        overwrite=options.overwrite, part=options.part,
    )  # fmt: skip


def _leaks(shards: ShardSet) -> list[str]:
    """A line on each two splits that share photographs."""
    if shards.dataset == DRAWN:
        return []  # they are alike without being copies
    if (found := recorded_leaks(shards)) is None:
        return ["leaks: not looked for, in a pack of a former version or of more than "
                f"{MOST_COMPARED} images; python -m shards.verify does"]  # fmt: skip
    return [*describe_leaks(found)]


def _release(options: argparse.Namespace) -> Release:
    """The data set that the command names, as its module in shards/releases lists it."""
    if options.dataset != "synthetic":
        return _listed(options, Source(Path(options.source), options.follow_links))
    return synthetic.release_by(
        options.by, options.train, options.val, identities=options.identities,
        held_out=options.held_out, size=options.size, seed=options.seed,
    )  # fmt: skip


def _listed(options: argparse.Namespace, source: Source) -> Release:
    """The release in the folder `source`, as its module lists it, in the splits asked for."""
    match options.dataset:
        case "affectnet":
            found = affectnet.release(
                source, classes=options.classes, size=options.size, margin=options.margin
            )
        case "rafdb" | "rafdb-compound":
            found = rafdb.release(source, compound=options.dataset == "rafdb-compound")
        case "sfew":
            found = sfew.release(source, landmarks=options.landmarks, size=options.size)
        case "fer2013":
            found = fer2013.release(source)
        case "ferplus":
            found = ferplus.release(source)
        case "expw":
            found = expw.release(source, margin=options.margin)
            if options.split is None and options.splits is None:
                log.warning("ExpW has no splits, all faces are 'train'; --split 0.8 makes two")
        case "caers":
            found = caers.release(source, boxes=options.boxes, margin=options.margin)
        case "identities":
            found = identities.release(source, options.held_out)
        case "folder":
            found = folder.release(source, skip=options.skip, is_divided=options.split is not None)
        case name:
            raise NotImplementedError(f"{name} is in RELEASES, but nothing here lists it")
    if getattr(options, "face_cut", None) is not None:
        found = replace(found, face_cut=options.face_cut)
    if getattr(options, "split", None) is not None:
        found = splitting.divide(found, options.split)
    if getattr(options, "splits", None) is not None:
        found = splitting.assign(found, options.splits)
    if links := found.left_out.counts[LEADS_OUT]:
        log.warning("%d links lead out of %s; %s", links, source.root, FOLLOW)
    return found


RELEASES = {
    "affectnet": "AffectNet: the reduced or the full release, or AffectNet+",
    "rafdb": "RAF-DB's basic set",
    "rafdb-compound": "RAF-DB's compound set, of eleven mixed expressions",
    "sfew": "SFEW 2.0, aligned faces or film frames",
    "fer2013": "FER-2013, the CSV of pixels or folders",
    "ferplus": "FERPlus: FER-2013's CSV and fer2013new.csv, the votes of ten people",
    "expw": "ExpW, photographs with label.lst",
    "caers": "CAER-S, whole frames, with a file of face boxes",
    "folder": "train/<class>/*, val/<class>/* and further splits",
    "identities": "<identity>/<image>, as MS-Celeb-1M",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.pack", description=__doc__)
    kinds = parser.add_subparsers(dest="dataset", required=True)
    sources = {name: kinds.add_parser(name, help=text) for name, text in RELEASES.items()}
    for kind in sources.values():
        kind.add_argument("--source", required=True, help="the release's folder")
        kind.add_argument(
            "--size", type=_size, default=224, help="pixels, or 'native' (default 224)"
        )
        kind.add_argument(
            "--follow-links", type=Path, metavar="FOLDER",
            help="follow links that lead into FOLDER too (default: within the source alone)",
        )  # fmt: skip
        kind.add_argument(
            "--drop-leaks", action="store_true",
            help="leave out training images that show a photograph of another split",
        )  # fmt: skip
    _add_own_options(sources)
    faces = kinds.add_parser("synthetic", help="drawn faces of eight expressions")
    _add_drawing(faces)
    merging = kinds.add_parser("merge", help="ends a pack that was made in parts")
    for kind in (*sources.values(), faces, merging):
        kind.add_argument("--out", required=True, help="the folder for the shards")
    for kind in (*sources.values(), faces):
        kind.add_argument("--workers", type=worker_count, default=0,
                          help="processes (default: all cores)")  # fmt: skip
        kind.add_argument("--shard-size", type=int, default=SHARD_SIZE, help="images a shard")
        kind.add_argument("--overwrite", action="store_true", help="replace shards in --out")
        kind.add_argument(
            "--part", type=_part, default=(1, 1), metavar="I/N",
            help="pack one part of N, on several machines at once; then merge",
        )  # fmt: skip
    return parser


def _add_own_options(sources: dict[str, argparse.ArgumentParser]) -> None:
    """The options that some releases alone take."""
    for name in ("folder", "expw"):
        sources[name].add_argument(
            "--split", type=_share, metavar="SHARE",
            help="where the release has no splits: the fraction of each class for training, first "
            "in the order of sha256 of the files' names; the rest becomes 'val'",
        )  # fmt: skip
    for name in sources.keys() - {"identities"}:
        sources[name].add_argument(
            "--splits", type=Path, metavar="FILE",
            help="lines of <path or key>,<split>, which replace the release's own splits",
        )  # fmt: skip
    sources["folder"].add_argument(
        "--skip", action="append", default=[], metavar="NAME",
        help="pass a side folder over, by its name or its path in the source; may be repeated",
    )  # fmt: skip
    for name in ("folder", "identities"):
        sources[name].add_argument(
            "--face-cut", type=_face_cut, metavar="CUT",
            help=f"how faces were cut out of photographs, for predictions to repeat: {EXPECTED} "
            "(default as_released)",
        )  # fmt: skip
    sources["affectnet"].add_argument("--classes", type=int, choices=(7, 8), default=8)
    for name in ("affectnet", "expw", "caers"):
        sources[name].add_argument(
            "--margin", type=_fraction, default=0.0,
            help="around face boxes (of AffectNet's full release), of their size, on each side "
            "(default 0)",
        )  # fmt: skip
    sources["caers"].add_argument("--boxes", help="lines of path,x,y,width,height, a face each")
    sources["sfew"].add_argument("--landmarks", help="the file that python -m shards.align wrote")
    sources["identities"].add_argument(
        "--held-out", type=int,
        help="identities kept out of training, for verification (default: a tenth, 20 to 1000)",
    )  # fmt: skip


def _add_drawing(faces: argparse.ArgumentParser) -> None:
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


def _size(text: str) -> int | None:
    if text == "native":
        return None
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MOST_PIXELS:
        raise argparse.ArgumentTypeError(
            f"must be 1 to {MOST_PIXELS} pixels or 'native', got {text!r}"
        )
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= MOST_MARGIN:
        raise argparse.ArgumentTypeError(f"expected 0 to {MOST_MARGIN:g}, got {text}")
    return value


def _face_cut(text: str) -> str:
    try:
        return str(parse_cut(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0, at most 1, got {text}")
    return value


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected I/N, as 1/8, got {text!r}")
    return int(found[1]), int(found[2])
