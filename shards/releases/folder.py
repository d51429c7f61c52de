"""Any folder tree train/<class>/*, val/<class>/* (test/ and other splits likewise)."""

from functools import partial
from pathlib import Path

from shards.folders import is_picture
from shards.release import Item, LeftOut, Release
from shards.releases.source import Keys, entries, plain_name, read, walk


def release(source: str | Path) -> Release:
    """The images of a folder tree; classes are train's folder names in alphabetical order.

    Hidden files are passed over; links that lead out of `source`, and files deeper than a class's
    folder, are left out. A file that is no image is found by its content when it is packed.
    """
    root = Path(source)
    left_out = LeftOut(root)
    if not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{root / 'train'} not found; expected {root}/train/<class>/<images>"
        )
    trees = {
        split.name: [c.name for c in entries(Path(split.path), root, left_out) if c.is_dir()]
        for split in entries(root, root, left_out)
        if split.is_dir()
    }
    names = tuple(trees.get("train", ()))
    if not names:
        raise ValueError(f"{root / 'train'} holds no class folders")
    splits: dict[str, list[Item]] = {}
    for split, classes in trees.items():
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise ValueError(f"{root / split / unknown[0]}: class '{unknown[0]}' is not in train/")
        keys, splits[split] = Keys(), []
        for name in classes:
            for image in entries(root / split / name, root, left_out):
                source = f"{split}/{name}/{image.name}"
                if image.is_file():
                    if not is_picture(image, left_out.passed_over):
                        continue
                    key = keys.make(f"{name}_{Path(image.name).stem}", f"{name}_{image.name}")
                    splits[split].append(Item(key, names.index(name), source))
                elif not image.is_dir():
                    left_out.add("no regular file", root / source)
                elif deeper := sum(1 for _ in walk(root / source, root, left_out)):
                    left_out.add("deeper than a class's folder", root / source, images=deeper)
    splits = {"train": splits.pop("train"), **splits}
    return Release(
        "folder",
        "train/<class>/<images>",
        tuple(map(plain_name, names)),
        splits,
        partial(read, root=root.absolute()),
        left_out,
    )
