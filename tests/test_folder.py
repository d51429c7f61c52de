"""Folder trees, and the reading of any source: names, links, keys."""

import os
import re
import shutil
from pathlib import Path

import layouts
import pytest
from packs import pack_command, refused
from trees import CLASSES, encoded, packed, picture, tree

from shards.format import open_shardset
from shards.releases import folder
from shards.releases import source as source_files
from shards.releases.drawing.face import draw_face
from shards.releases.source import Keys, Source, read_file


def test_links_out_of_the_source_are_not_followed(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(picture(5), "JPEG"))
    (source / "train" / "happy" / "link.jpg").symlink_to(secret)
    (source / "train" / "sad").symlink_to(tree(tmp_path / "other") / "val" / "angry")
    release = folder.release(source)
    assert release.class_names == CLASSES and len(release.splits["train"]) == 18


def test_names_in_any_script_are_packed_apart(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=1, val=1)
    jpeg = encoded(picture(1), "JPEG")
    for k in range(120):
        (source / "train" / "happy" / f"{chr(0x4E00 + k)}的脸.jpg").write_bytes(jpeg)
    counts = open_shardset(packed(source, tmp_path / "out")).counts
    assert counts["train"] == (1, 121)


def test_files_that_share_a_stem_keep_apart(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", train=1, val=1)
    (source / "train" / "happy_a").mkdir()
    for name in ("a b.jpg", "a.b.jpg", "0.png", "n" * 200 + ".jpg", "n" * 201 + ".jpg", "é.jpg"):
        (source / "train" / "happy" / name).write_bytes(encoded(picture(1), "JPEG"))
    (source / "train" / "happy_a" / "b.jpg").write_bytes(encoded(picture(1), "JPEG"))
    keys = [item.key for item in folder.release(source).splits["train"]]
    assert len(set(keys)) == len(keys) == 9
    packed(source, tmp_path / "out")  # which refuses keys that a tar would not keep


def test_names_of_any_bytes(tmp_path: Path) -> None:
    """Names that are no UTF-8, as old archives hold them."""
    root = tmp_path / "people"
    for identity in (b"caf\xe9", b"caf\xe8"):
        folder = os.fsencode(root) + b"/" + identity
        Path(os.fsdecode(folder)).mkdir(parents=True)
        for name in (b"a\xff.jpg", b"a\xfe.jpg"):
            draw_face(0, 1, 0, size=32).save(tmp_path / "face.jpg")
            shutil.copy(tmp_path / "face.jpg", folder + b"/" + name)
    shards, _ = pack_command(root, "identities", "--size", "32")
    assert shards.counts["train"] == (2, 2) and shards.class_names[1] == "caf\\xe9"
    (tmp_path / "tree").mkdir()
    for split in ("train", "val"):
        shutil.copytree(root, tmp_path / "tree" / split)
    shards, _ = pack_command(tmp_path / "tree", "folder", "--size", "32")
    assert shards.counts == {"train": (2, 2), "val": (2, 2)}


def test_links_and_paths_out_of_a_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "source" / "own").write_text("o")
    (tmp_path / "source" / "inward").symlink_to("own")
    (tmp_path / "source" / "outward").symlink_to("../secret")
    (tmp_path / "source" / "folder").symlink_to("..")
    assert read_file(Source(tmp_path / "source"), "inward") == b"o"
    for relative in ("outward", "folder/secret", "../secret", str(tmp_path / "secret")):
        with pytest.raises(ValueError, match="out of the source"):
            read_file(Source(tmp_path / "source"), relative)


def test_pipes_and_huge_files_of_a_source_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(bytes(1000))
    monkeypatch.setattr(source_files, "MAX_BYTES", 999)
    for name, error in (("pipe", "no regular file"), ("huge", "1000 bytes, at most 999")):
        with pytest.raises(ValueError, match=error):
            read_file(Source(tmp_path), name)


@pytest.mark.parametrize("kind", ["affectnet", "rafdb"])
def test_linked_folders_out_of_a_source_are_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "release"
    if kind == "affectnet":
        layouts.write_affectnet_full(root, 16, 8, size=32, seed=0)
        folder = root / "Manually_Annotated_Images"
    else:
        layouts.write_rafdb(root, 14, 7, seed=0)
        folder = root / "Image" / "aligned"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert f"{folder} is a link that leads out of the source" in refused(root, kind)


def test_keys_are_given_once() -> None:
    keys = Keys()
    assert [keys.make("a", "a-jpg") for _ in range(3)] == ["a", "a-jpg", "a-jpg_"]
    odd = [keys.make(name) for name in ("a b", "a_b", "a.b", "的", "脸")]
    assert odd[1] == "a_b" and len(set(odd)) == 5
    assert all(re.fullmatch(r"a_b_[0-9a-f]{12}|a_b|__[0-9a-f]{12}", key) for key in odd)
