"""Verification: do two images show the same person? Pairs of images, judged as on LFW.

Huang et al., Labeled Faces in the Wild (2007), protocol "image-restricted": ten folds that share no
person, half of the pairs of one person each.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.format import Split
from shards.releases.source import Source, lines, safe_key

FOLDS = 10
FAR = 1e-3  # false accept rate at which the true accept rate is given
TRIES = 4  # pairs drawn for each that is wanted: of few images, many are drawn twice


class Pairs(NamedTuple):
    """n pairs of images of a split, by their numbers in its index."""

    first: NDArray[np.int64]  # (n,)
    second: NDArray[np.int64]  # (n,)
    same: NDArray[np.bool_]  # (n,) of one person
    fold: NDArray[np.int64]  # (n,) 0 … FOLDS − 1


class Verification(NamedTuple):
    """How well similarities separate pairs of one person from pairs of two."""

    metrics: dict[str, float]  # accuracy (mean over folds), auc, tar_at_far_0.001
    right: NDArray[np.bool_]  # (n,) classified rightly, at the threshold of the other folds
    false_accepts: NDArray[np.float64]  # the ROC's points: rates of pairs of two persons …
    true_accepts: NDArray[np.float64]  # … and of one that are taken for one


def draw_pairs(labels: NDArray[np.integer], count: int, seed: int = 0) -> Pairs:
    """At most `count` different pairs, as LFW's were drawn; a function of the arguments alone.

    Persons are dealt to the folds. In each fold, a person is drawn and two images of it, or two
    persons and an image of each; where there are fewer pairs than wanted of one kind, there are as
    few of the other.

    Too few pairs or persons, or a fold in which no person has two images, are a ValueError.
    """
    if count < 2 * FOLDS:
        raise ValueError(f"{count} pairs, at least {2 * FOLDS} are needed, for {FOLDS} folds")
    order = np.argsort(labels, kind="stable")
    persons, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    if len(persons) < 2 * FOLDS:
        raise ValueError(
            f"{len(persons)} persons, verification needs {2 * FOLDS}: two in each of {FOLDS} folds"
        )
    rng = np.random.Generator(np.random.Philox(seed))
    folds = rng.permutation(len(persons)) % FOLDS
    drawn = [np.empty((0, 4), np.int64)]
    for fold in range(FOLDS):
        own = np.flatnonzero(folds == fold)
        several = own[sizes[own] > 1]
        if not len(several):
            raise ValueError("no person of a fold has two images; verification needs more persons")
        tries = TRIES * (count // (2 * FOLDS))
        one = rng.choice(several, tries)
        a, b = _different(rng, sizes[one])
        same = _distinct(starts[one] + a, starts[one] + b)
        a, b = _different(rng, np.full(tries, len(own)))
        left, right = (starts[p] + rng.integers(sizes[p]) for p in (own[a], own[b]))
        different = _distinct(left, right)
        most = min(len(same), len(different), count // (2 * FOLDS))
        for kind, found in ((1, same[:most]), (0, different[:most])):
            marks = np.broadcast_to([kind, fold], (most, 2))
            drawn.append(np.hstack([order[found], marks]))
    first, second, same_, fold_ = np.concatenate(drawn).T
    return Pairs(first, second, same_.astype(bool), fold_)


def _different(
    rng: np.random.Generator, sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two different numbers below each size (at least 2)."""
    a, b = rng.integers(sizes), rng.integers(sizes - 1)
    return a, b + (b >= a)


def _distinct(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, 2) the pairs in the order in which they were drawn, none twice, nor turned around."""
    pairs = np.sort(np.stack([a, b], axis=1), axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    distinct: NDArray[np.int64] = pairs[np.sort(first)]
    return distinct


def read_pairs(path: Path, split: Split) -> Pairs:
    """The pairs of a text file, a line each, in FOLDS folds of consecutive lines.

    Lines are those of LFW's pairs.txt, `PERSON n m` and `PERSON n PERSON m` (its first line is the
    number of folds), or `PERSON/FILE PERSON/FILE`, separated by tabs or, without any, by spaces.

    A ValueError names the line: of another form, with an image that the split does not hold or
    holds twice, with an image beside itself; or the fold that lacks pairs of one kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data.pairs_file {path}: no such file")
    numbers = _numbers(split)
    found: list[tuple[int, int, bool]] = []
    for where, begin, text in lines(path, Source(path.parent)):
        words = [word.strip() for word in text.split("\t" if "\t" in text else None)]
        if begin < 4 and all(word.isdecimal() for word in words):  # a byte order mark may precede
            if words[0] != str(FOLDS):
                raise ValueError(f"{where}: {words[0]} folds, expected {FOLDS}")
            continue
        try:
            names = [_person_and_stem(word) for word in _as_paths(words)]
        except ValueError as error:
            raise ValueError(
                f"{where}: {text!r}, expected 'PERSON n m', 'PERSON n PERSON m' or "
                "'PERSON/FILE PERSON/FILE'"
            ) from error
        own = [numbers.get(name, []) for name in names]
        for (person, stem), samples in zip(names, own, strict=True):
            if len(samples) != 1:
                raise ValueError(
                    f"{where}: {split.root} has {len(samples) or 'no'} images '{stem}' of "
                    f"'{person}' in split '{split.name}', expected one"
                )
        if own[0] == own[1]:
            raise ValueError(f"{where}: {text!r} is an image beside itself")
        found.append((own[0][0], own[1][0], names[0][0] == names[1][0]))
    table = np.array(found, np.int64).reshape(-1, 3)
    fold = np.arange(len(table)) * FOLDS // max(1, len(table))
    pairs = Pairs(table[:, 0], table[:, 1], table[:, 2].astype(bool), fold)
    for k in range(FOLDS):
        if not 0 < pairs.same[fold == k].sum() < (fold == k).sum():
            raise ValueError(f"{path}: fold {k + 1} of {FOLDS} lacks pairs of one person or of two")
    return pairs


def _as_paths(words: list[str]) -> list[str]:
    """`PERSON/FILE` of both images of a line; a ValueError where it is of another form."""
    match words:
        case [person, n, m]:
            return _as_paths([person, n, person, m])
        case [person, n, other, m]:
            return [f"{person}/{person}_{int(n):04d}.jpg", f"{other}/{other}_{int(m):04d}.jpg"]
        case [_, _]:
            return words
    raise ValueError(f"{len(words)} words")


def _person_and_stem(path: str) -> tuple[str, str]:
    person, file = path.split("/")
    return person, safe_key(Path(file).stem)


def _numbers(split: Split) -> dict[tuple[str, str], list[int]]:
    """The samples by person and file's stem, of which `shards.pack identities` makes the keys."""
    numbers: dict[tuple[str, str], list[int]] = {}
    labels = split.index["label"].tolist()
    for number, (label, key) in enumerate(zip(labels, split.keys(), strict=True)):
        name = split.class_names[label], key.split("_", 2)[-1]
        numbers.setdefault(name, []).append(number)
    return numbers


def similarities(features: NDArray[np.float32], pairs: Pairs) -> NDArray[np.float64]:
    """The cosine of each pair's (images, D) features; 0 where one of them is all zero.

    Features that are not finite are a FloatingPointError.
    """
    if bad := int((~np.isfinite(features)).any(axis=1).sum()):
        raise FloatingPointError(f"the features of {bad} of {len(features)} images are not finite")
    wide = features.astype(np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    cosines: NDArray[np.float64] = (unit[pairs.first] * unit[pairs.second]).sum(axis=1)
    return cosines


def verify(similarity: NDArray[np.float64], pairs: Pairs) -> Verification:
    """ROC, its area, the true accept rate at FAR, and the accuracy over folds.

    Each fold's pairs are classified by the threshold that is right for the most of the others' (of
    several, the highest). The rate at FAR is the largest whose false accept rate is at most that:
    with fewer than 1 / FAR pairs of two persons, that of none.
    """
    from sklearn.metrics import roc_auc_score, roc_curve  # takes a second to import

    right = np.empty(len(similarity), bool)
    for fold in range(FOLDS):
        own = pairs.fold == fold
        rest = pairs.same[~own]
        far, tar, thresholds = roc_curve(rest, similarity[~own], drop_intermediate=False)
        hits = tar * rest.sum() + (1 - far) * (~rest).sum()
        right[own] = (similarity[own] >= thresholds[hits.argmax()]) == pairs.same[own]
    far, tar, _ = roc_curve(pairs.same, similarity, drop_intermediate=False)
    metrics = {
        "accuracy": float(np.mean([right[pairs.fold == k].mean() for k in range(FOLDS)])),
        "auc": float(roc_auc_score(pairs.same, similarity)),
        f"tar_at_far_{FAR:g}": float(tar[far <= FAR].max()),
    }
    return Verification(metrics, right, far, tar)
