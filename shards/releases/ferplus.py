"""FERPlus: FER-2013's faces, each with the votes of ten people (Barsoum et al., arXiv 1608.01041).

`fer2013new.csv` (github.com/microsoft/FERPlus) has a line of votes for each line of FER-2013's CSV,
in the same order. The rules of the majority are those of the authors' code, src/ferplus.py.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shards.release import Content, Item, LeftOut, Release, check_soft
from shards.releases import fer2013
from shards.releases.layout import contents, find_parts, only
from shards.releases.source import Source, check_total, lines, open_source

CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
COLUMNS = (*CLASSES, "unknown", "NF")  # of the votes; NF: no face
VOTES = "fer2013new.csv"
TOTALS = {"train": 28709, "val": 3589, "test": 3589}  # lines of fer2013new.csv, by its Usage
NO_MAJORITY = "no class has the majority of the votes"


class Ballot(NamedTuple):
    """The votes on one face."""

    where: str
    split: str
    name: str  # empty: the authors took the image out
    votes: tuple[int, ...]  # in the order of COLUMNS


def release(source: str | Path | Source) -> Release:
    """The faces on which a majority agrees, in the splits of FER-2013's Usage.

    Raises:
        FileNotFoundError: FER-2013's CSV or the votes are missing. ValueError: the two do not
            belong together, or a line is not of the form of theirs.
    """
    source = open_source(source)
    found, left_out = find_parts(source, (*fer2013.CSVS, VOTES)), LeftOut(source.root)
    faces = only([path for name in fer2013.CSVS for path in found[name]], source)
    votes = only(found[VOTES], source)
    if faces is None or votes is None:
        missing = VOTES if votes is None else " or ".join(fer2013.CSVS)
        raise FileNotFoundError(f"{source.root / missing} not found; {contents(source)}")
    splits: dict[str, list[Item]] = {split: [] for split in TOTALS}
    listed: dict[str, list[Item]] = {split: [] for split in TOTALS}
    ballots = _ballots(votes, source)
    for number, row in enumerate(fer2013.rows(faces, source)):
        ballot = next(ballots, None)
        if ballot is None or ballot.split != row.split:
            there = "ends" if ballot is None else f"has '{ballot.split}' at {ballot.where}"
            raise ValueError(f"{row.where}: a face of '{row.split}', {votes.name} {there}; the two "
                             "files are to have the same lines in the same order")  # fmt: skip
        item = fer2013.make_item(number, row, 0, source.relative(faces))
        listed[row.split].append(item)
        winner = majority(ballot.votes)
        if not ballot.name:
            left_out.add("taken out by the authors: the line names no image")
        elif winner is None:
            left_out.add(NO_MAJORITY)
        elif winner >= len(CLASSES):
            left_out.add(f"the majority's vote is {COLUMNS[winner]}")
        else:
            place = (*item.source, ballot.votes)
            splits[row.split].append(item._replace(label=winner, source=place))
    if (more := next(ballots, None)) is not None:
        raise ValueError(f"{more.where}: {faces.name} has no such line")
    check_total("FERPlus", listed, TOTALS)
    splits = {split: items for split, items in splits.items() if items}
    reader = partial(read, source=source.absolute())
    return Release(
        "FERPlus", f"majority of ten votes, {faces.name}", CLASSES, splits, reader, left_out
    )


def majority(votes: Sequence[int]) -> int | None:
    """The column that has more than half of the votes, single votes not counted; None: there is no.

    Columns with one vote are taken for errors (the paper's outlier rejection).
    """
    counted = [vote if vote > 1 else 0 for vote in votes]
    most = max(counted)
    return counted.index(most) if most > 0.5 * sum(counted) else None


def _ballots(path: Path, source: Source) -> Iterator[Ballot]:
    wanted = ("Usage", "Image name", *COLUMNS)
    is_header = True
    for where, _, line in lines(path, source):
        values = [value.strip() for value in fer2013.cells(line, where)]
        if is_header:
            if tuple(values) != wanted:
                raise ValueError(f"{where}: {line[:80]!r}, expected {','.join(wanted)}")
            is_header = False
            continue
        votes = values[2:]
        if len(values) != len(wanted) or not all(vote.isdecimal() for vote in votes):
            raise ValueError(f"{where}: {line[:80]!r}, expected {len(COLUMNS)} numbers of votes")
        if values[0] not in fer2013.SPLITS:
            raise ValueError(f"{where}: Usage {values[0]!r}, expected {', '.join(fer2013.SPLITS)}")
        counted = tuple(map(int, votes))
        check_soft(counted, f"{where}: votes")
        yield Ballot(where, fer2013.SPLITS[values[0]], values[1], counted)


def read(item: Item, source: Source) -> Content:
    """The face, with all ten votes in its JSON and those for a class as its soft label."""
    votes = item.source[4]
    meta = {"votes": dict(zip(COLUMNS, votes, strict=True))}
    soft = check_soft(votes[: len(CLASSES)], item.key)
    return Content(fer2013.read_face(item, source), meta, soft)
