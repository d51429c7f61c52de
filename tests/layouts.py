"""The real releases' folder layouts, filled with drawn faces: the same files, names and labels.

For trying the packers on data that everybody has. Labels are the release's own.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shards.images import encode
from shards.releases.affectnet import CLASSES
from shards.releases.drawing.face import draw_face
from shards.releases.synthetic import train_labels

RAFDB = ("surprise", "fear", "disgust", "happy", "sad", "anger", "neutral")  # its labels 1 to 7
SFEW = {"Angry": "anger", "Disgust": "disgust", "Fear": "fear", "Happy": "happy",
        "Neutral": "neutral", "Sad": "sad", "Surprise": "surprise"}  # fmt: skip
FER2013 = ("anger", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # its labels 0 to 6
FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt",
           "unknown", "NF")  # fmt: skip
ANNOTATIONS = ("exp", "val", "aro", "lnd")
PHOTO_SIDE = 3  # a full release's photo is this many times as wide as the face in it


def write_folder(out: Path, counts: dict[str, int], *, size: int, seed: int) -> None:
    """`<split>/<class>/<number>.jpg` for each split of `counts` (split → images)."""
    start = 0
    for split, count in counts.items():
        for index, label in _numbered(count, start):
            path = out / split / CLASSES[label] / f"{index}.jpg"
            _save(path, draw_face(seed, index, label, size=size))
        start += count


def write_affectnet_reduced(
    out: Path, train: int, val: int, *, size: int, seed: int, distinct: int | None = None
) -> None:
    """`train_set/images/<id>.jpg`, `annotations/<id>_{exp,val,aro,lnd}.npy`; `val_set` likewise.

    distinct: different faces a split; the others are hard links to them.
    """
    for split, count, start in (("train_set", train, 0), ("val_set", val, train)):
        images, notes = out / split / "images", out / split / "annotations"
        notes.mkdir(parents=True, exist_ok=True)
        own = np.bincount(train_labels(min(distinct or count, count)))  # faces of each class
        drawn: list[list[int]] = [[] for _ in CLASSES]
        for number, (index, label) in enumerate(_numbered(count, start)):
            files = [(images, "", ".jpg"), *((notes, f"_{kind}", ".npy") for kind in ANNOTATIONS)]
            if len(drawn[label]) == own[label]:
                first = drawn[label][number % own[label]]
                for folder, kind, suffix in files:
                    os.link(folder / f"{first}{kind}{suffix}", folder / f"{index}{kind}{suffix}")
                continue
            drawn[label].append(index)
            _save(images / f"{index}.jpg", draw_face(seed, index, label, size=size))
            values = (
                np.array(str(label)),
                np.array("0.1"),
                np.array("-0.2"),
                np.linspace(0, size, 136),
            )
            for kind, value in zip(ANNOTATIONS, values, strict=True):
                np.save(notes / f"{index}_{kind}.npy", value, allow_pickle=False)


def write_affectnet_full(out: Path, train: int, val: int, *, size: int, seed: int) -> None:
    """Whole photos with one face somewhere, and `training.csv`, `validation.csv` with its box."""
    fields = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
              "facial_landmarks", "expression", "valence", "arousal")  # fmt: skip
    for name, count, start in (("training", train, 0), ("validation", val, train)):
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(fields)
            for index, label in _numbered(count, start):
                relative = f"{index % 7}/{index:032x}.jpg"
                x, y = (37 * index) % (2 * size), (53 * index) % (2 * size)
                photo = Image.new("RGB", (PHOTO_SIDE * size, PHOTO_SIDE * size), (90, 120, 80))
                photo.paste(draw_face(seed, index, label, size=size), (x, y))
                _save(out / "Manually_Annotated_Images" / relative, photo)
                landmarks = ";".join(f"{x + k % size}.0;{y + k % size}.0" for k in range(68))
                rows.writerow([relative, x, y, size, size, landmarks, label, 0.1, -0.2])


def write_affectnet_plus(
    out: Path, train: int, val: int, *, size: int, seed: int, is_beside: bool
) -> None:
    """`train_set/images/<id>.jpg` and `annotations/<id>.json`, or both in `train/`; validation."""
    for split, count, start in (("train", train, 0), ("validation", val, train)):
        home = out / split if is_beside else out / f"{split}_set"
        images, notes = (home, home) if is_beside else (home / "images", home / "annotations")
        notes.mkdir(parents=True, exist_ok=True)
        for index, label in _numbered(count, start):
            _save(images / f"{index}.jpg", draw_face(seed, index, label, size=size))
            soft = [0.86 if k == label else 0.02 for k in range(len(CLASSES))]
            note = {"Human-Label": label, "Soft-Label": soft, "Subset": index % 3,
                    "Metadata": {"Valence": 0.1, "Arousal": -0.2}}  # fmt: skip
            (notes / f"{index}.json").write_text(json.dumps(note))


def write_rafdb(
    out: Path, train: int, test: int, *, seed: int, size: int = 100, classes: int = len(RAFDB)
) -> None:
    """`EmoLabel/list_patition_label.txt` (sic) and `Image/aligned/<name>_aligned.jpg`, 100 px."""
    lines, index = [], 0
    for split, digits, count in (("train", 5, train), ("test", 4, test)):
        for k in range(count):
            label = k % classes
            name = f"{split}_{k + 1:0{digits}d}"
            expression = CLASSES.index(RAFDB[label % len(RAFDB)])
            image = draw_face(seed, index, expression, size=size)
            _save(out / "Image" / "aligned" / f"{name}_aligned.jpg", image)
            lines.append(f"{name}.jpg {label + 1}")
            index += 1
    (out / "EmoLabel").mkdir(parents=True, exist_ok=True)
    (out / "EmoLabel" / "list_patition_label.txt").write_text("\n".join(lines))


def write_sfew(
    out: Path, train: int, val: int, *, seed: int, size: int = 128, aligned: bool = True
) -> None:
    """`Train/Train_Aligned_Faces/<Class>/*.png` and `Val/…`; without the middle folder if not."""
    index = 0
    for split, count in (("Train", train), ("Val", val)):
        home = out / split / f"{split}_Aligned_Faces" if aligned else out / split
        for k in range(count):
            name, expression = list(SFEW.items())[k % len(SFEW)]
            image = draw_face(seed, index, CLASSES.index(expression), size=size)
            _save(home / name / f"Film_{k:09d}_{index:08d}.png", image)
            index += 1


def write_fer2013(
    out: Path, counts: dict[str, int], *, seed: int, votes: Sequence[Sequence[int]] = (),
    name: str = "fer2013.csv",
) -> None:  # fmt: skip
    """The CSV of pixels, Usage → images; and with `votes`, taken in turn, `fer2013new.csv`."""
    out.mkdir(parents=True, exist_ok=True)
    is_icml = name != "fer2013.csv"
    usages = [usage for usage, count in counts.items() for _ in range(count)]
    with (out / name).open("w", newline="") as file:
        rows = csv.writer(file)
        header = ("emotion", " Usage", " pixels") if is_icml else ("emotion", "pixels", "Usage")
        rows.writerow(header)
        for index, usage in enumerate(usages):
            face = draw_face(seed, index, CLASSES.index(FER2013[index % 7]), size=48)
            pixels = " ".join(map(str, np.asarray(face.convert("L")).ravel().tolist()))
            rows.writerow([index % 7, *((usage, pixels) if is_icml else (pixels, usage))])
    if votes:
        with (out / "fer2013new.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["Usage", "Image name", *FERPLUS])
            for index, usage in enumerate(usages):
                own = votes[index % len(votes)]
                rows.writerow([usage, f"fer{index:07d}.png" * (sum(own) > 0), *own])


def write_expw(out: Path, photos: int, *, seed: int, faces: int = 2, size: int = 24) -> None:
    """`origin/<photo>.jpg` of several faces side by side, and `label.lst` with their boxes."""
    lines = []
    for photo in range(photos):
        image = Image.new("RGB", (faces * size, size), (90, 120, 80))
        for face in range(faces):
            index = faces * photo + face
            label = index % len(FER2013)
            drawn = draw_face(seed, index, CLASSES.index(FER2013[label]), size=size)
            image.paste(drawn, (face * size, 0))
            left = face * size
            lines.append(f"photo_{photo}.jpg {face} 0 {left} {left + size} {size} 97.5 {label}")
        _save(out / "origin" / f"photo_{photo}.jpg", image)
    (out / "label.lst").write_text("\n".join(lines))


def write_caers(out: Path, train: int, test: int, *, seed: int, size: int = 24) -> list[str]:
    """`{train,test}/<Class>/<number>.png`, frames with a face at (size, 0); the lines of boxes."""
    boxes = []
    for split, count in (("train", train), ("test", test)):
        for k in range(count):
            name = ("Anger", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")[k % 7]
            frame = Image.new("RGB", (2 * size, size), (90, 120, 80))
            expression = CLASSES.index(name.lower())
            frame.paste(draw_face(seed, k, expression, size=size), (size, 0))
            _save(out / split / name / f"{k:04d}.png", frame)
            boxes.append(f"{split}/{name}/{k:04d}.png,{size},0,{size},{size}")
    return boxes


def _numbered(count: int, start: int) -> Iterator[tuple[int, int]]:
    """(index, label) of `count` faces in AffectNet's proportions."""
    labels: Sequence[int] = train_labels(count)
    return ((start + k, label) for k, label in enumerate(labels))


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        path.write_bytes(encode(image))
    else:
        image.save(path)
