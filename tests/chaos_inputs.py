"""Spoiled images, shards and configurations."""

import io
import os
import socket
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from chaos_trial import Trial, predicted, set_copy
from packs import pack_here
from PIL import Image
from spoiled import damage, damaged_scans, odd_value
from trees import edit_manifest, encoded, picture

from dan_dist.config import load_config, shipped_folder, to_yaml
from dan_dist.data.reader import Reader
from dan_dist.dry_run import check
from dan_dist.keys import names
from dan_dist.redaction import redact
from shards import verify
from shards.format import ShardSet, open_shardset
from shards.images import FORMATS

FILES = 8  # of one trial of images
MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "RGBA", "P", "I;16", "1", "LA"),
         "TIFF": ("RGB", "L", "CMYK", "I;16", "F", "1"), "GIF": ("P", "L"), "PPM": ("RGB", "L"),
         "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "L", "P"),
         "JPEG2000": ("RGB", "L")}  # fmt: skip
ODD_NAMES = ("a b", "ä", "x" * 200, "new\nline", "\x1b[31m", "-rf", "a'b\"c", "%s{0}", "日本")


def drawn(dice: Random) -> tuple[bytes, str]:
    """A picture in one of the formats that are read, and its kind."""
    kind = dice.choice([name for name in FORMATS if name in MODES])
    mode = dice.choice(MODES[kind])
    size = (dice.randint(1, 80), dice.randint(1, 80))
    options: dict[str, Any] = {"progressive": True} if dice.random() < 0.5 else {}
    if kind == "TIFF":
        options = {"compression": dice.choice((None, "tiff_lzw", "tiff_deflate", "packbits"))}
    image = picture(dice.randrange(10**6), size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    else:
        image = image.convert(mode)
    return encoded(image, kind, **(options if kind in ("JPEG", "TIFF") else {})), f"{kind} {mode}"


def odd_file(dice: Random, path: Path) -> str:
    """Makes something that is no regular file with content."""
    kind = dice.choice(("pipe", "socket", "zero", "loop", "nothing", "folder", "proc"))
    links = {"zero": "/dev/zero", "loop": path.name, "nothing": "missing", "proc": "/proc/kmsg"}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket" and len(os.fspath(path)) < 100:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(os.fspath(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(links.get(kind, "missing"))
    return kind


def spoiled_image(trial: Trial, folder: Path, number: int) -> Path:
    """Writes one picture that is damaged, odd, or something else."""
    dice = trial.dice
    name = f"{number}{dice.choice(ODD_NAMES) if dice.random() < 0.2 else ''}"
    path = folder / f"{name}.{dice.choice(('jpg', 'png', 'tif', 'webp', 'jp2', 'gif'))}"
    if dice.random() < 0.1:
        trial.done.append(f"{number}: {odd_file(dice, path)}")
        return path
    if dice.random() < 0.15:
        kind, data = dice.choice([*damaged_scans(dice.choice(trial.material.images)).items()])
    else:
        data, kind = drawn(dice)
        for _ in range(dice.choice((0, 1, 1, 3))):
            data, how = damage(dice, data)
            kind += f" {how}"
    path.write_bytes(data)
    trial.done.append(f"{number}: {kind}")
    return path


def images(trial: Trial) -> None:
    """predict, on a folder of them: a row for each, a right one or one with its reason."""
    (folder := trial.folder / "images").mkdir()
    paths = [spoiled_image(trial, folder, k) for k in range(FILES)]
    (folder / "good.jpg").write_bytes(trial.material.images[0])
    rows = predicted(trial.material.run / "best.pt", folder)
    found = {row["image"]: row for row in rows}
    assert "class" in found[str(folder / "good.jpg")], found
    missing = {str(path) for path in paths if not path.is_dir()} - set(found)
    assert not missing, f"not a word on {missing}"


def packing(trial: Trial) -> None:
    """pack, of a tree in which they lie; what it packs has no fault."""
    source, out = trial.folder / "source", trial.folder / "out"
    for split in ("train", "val"):
        for name in ("angry", "happy"):
            (folder := source / split / name).mkdir(parents=True)
            for k in range(2):
                (folder / f"good{k}.jpg").write_bytes(encoded(picture(k), "JPEG"))
            spoiled_image(trial, folder, 0)
            spoiled_image(trial, folder, 1)
    code, text = pack_here("folder", "--source", source, "--out", out, "--size", "24",
                           "--workers", "1")  # fmt: skip
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text and (code, len(errors)) in ((0, 0), (2, 1)), (code, text)
    if code == 0:
        assert verified(out) == 0


def verified(folder: Path) -> int:
    """The exit code of `verify`, whose own lines are of no interest."""
    with redirect_stdout(out := io.StringIO()), redirect_stderr(out):
        code = verify.main([str(folder), "--workers", "1"])
    assert "Traceback" not in out.getvalue(), out.getvalue()
    return code


def shards(trial: Trial) -> None:
    """A file of a set is not what was packed: what is read is, or is reported."""
    folder, dice = set_copy(trial), trial.dice
    path = folder / dice.choice(sorted(trial.material.digests))
    if path.name == "manifest.json" and dice.random() < 0.7:
        edit_manifest(folder, lambda content: trial.done.append(spoil_manifest(dice, content)))
    elif dice.random() < 0.15:
        path.unlink()
        trial.done.append(f"{path.name}: {odd_file(dice, path)}")
    else:
        data, how = damage(dice, path.read_bytes())
        path.write_bytes(data)
        trial.done.append(f"{path.name}: {how}")
    is_whole = verified(folder) == 0
    found = open_shardset(folder)
    for name in found.splits:
        read_as_packed(trial.material.shards, found, name, is_whole=is_whole)


def spoil_manifest(dice: Random, content: dict[str, Any]) -> str:
    """Changes a value of a manifest to another that JSON holds."""
    inner: Any = content
    while True:
        key = dice.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], dict | list) or not inner[key] or dice.random() < 0.3:
            break
        inner = inner[key]
    plain = [None, True, -1, 0, 3, 2**62, 2**70, 0.5, 1e308, "", "x", "../x", "\x1b[31m", "a/b",
             "a\nb", [], [1], {}, {"a": 1}, "manifest.json", "x" * 1000]  # fmt: skip
    inner[key] = dice.choice(plain)
    return f"manifest {key} = {str(inner[key])[:40]!r}"


def read_as_packed(true: ShardSet, found: ShardSet, name: str, *, is_whole: bool) -> None:
    """Every image of a split is the packed one, or is reported, and verify has found it too."""
    split = found.split(name)
    if name not in true.splits:
        return
    original, reader = true.split(name), Reader(split, max_bad=10**6)
    try:
        for sample in range(len(split)):
            content = reader.read(sample).tobytes()
            as_packed = sample < len(original) and content == original.encoded(sample)
            assert as_packed or sample in reader.bad, f"sample {sample} of {name} is another"
    finally:
        reader.close()
    assert not (is_whole and reader.bad), f"verify found nothing, reading did: {reader.bad}"


def configurations(trial: Trial) -> None:
    """A configuration, and words of a command line: refused, or read again as the same."""
    dice, path = trial.dice, trial.folder / "c.yaml"
    shipped = sorted(shipped_folder().glob("*.yaml"))
    text = dice.choice((to_yaml(load_config("demo")), dice.choice(shipped).read_text()))
    for _ in range(dice.choice((0, 1, 1, 2))):
        text = spoiled_text(trial, text)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    words = [odd_word(dice) for _ in range(dice.choice((0, 0, 1, 2)))]
    trial.done.append(f"{words}")
    trial.named += ["c.yaml", *(w.partition("=")[0] for w in words), *words, "command line"]
    config = load_config(path, words)
    (again := trial.folder / "again.yaml").write_text(to_yaml(config))
    if redact(values := str(config.model_dump())) == values:  # else its YAML is without the secret
        assert load_config(again) == config, "its own YAML is read as another"
    trial.named += [key for key in names()] + [str(trial.material.folder)]
    options = [f"data.shards={trial.material.shards.root}", "data.synthetic=null",
               f"train.output={trial.folder / 'run'}", "tracking.enabled=false",
               "train.device=cpu"]  # fmt: skip
    check(load_config(again, options), 1)


def spoiled_text(trial: Trial, text: str) -> str:
    """YAML with a fault of bytes, of lines, or of a value."""
    dice = trial.dice
    kind = dice.choice(("bytes", "value", "value", "value", "indent", "twice", "gone", "yaml"))
    if kind == "bytes":
        data, how = damage(dice, text.encode("utf-8", "surrogateescape"))
        trial.done.append(how)
        return data.decode("utf-8", "surrogateescape")
    lines = text.splitlines() or [""]
    at = dice.randrange(len(lines))
    before = lines[at]
    changes: dict[str, Callable[[], list[str]]] = {
        "value": lambda: [f"{before.partition(':')[0]}: {odd_text(dice)}"],
        "indent": lambda: [" " * dice.randint(1, 9) + before], "twice": lambda: [before, before],
        "gone": list, "yaml": lambda: [dice.choice(YAML)],
    }  # fmt: skip
    lines[at : at + 1] = changes[kind]()
    trial.done.append(f"line {at + 1} {kind}: {lines[at] if at < len(lines) else ''!r:.80}")
    return "\n".join(lines)


YAML = ("&a [*a]", "*x", "!!python/object/apply:os.system ['true']", "? [a]\n: b", "--- \na: 1",
        "<<: {a: 1}", "{" * 5000, "- " * 3000, "a: &x [*x, *x]", "\t", "%TAG ! x", "base: demo",
        "base: c.yaml", "base: /dev/zero", "train:", "model: 7", "x: !!binary aa", "'")  # fmt: skip


def odd_text(dice: Random) -> str:
    """A value as somebody may type it."""
    texts = ("", "null", "~", "yes", "0x10", "1_000", "1e3", "-0", "1e999", ".nan", "007", "7.0",
             "[1, 2", "{a: b}", "[[[[]]]]", "'", '"', "2026-01-01", "12:30", "1e-400", "٣", "½",
             "${HOME}", "$X", "/dev/zero", "/proc/self/mem", "..", "a\0b", "True", "off", "9" * 500,
             "x" * 5000, "!!int 3", "*a", "-1", "0", "2", "64", "1e9", "http://u:p@127.0.0.1:1/",
             "file:///etc", "adam", "sgd", "cosine", "none", "[0.5, 1]", "[1]")  # fmt: skip
    if dice.random() < 0.8:
        return dice.choice(texts)
    value = odd_value(dice)
    return "[" * 30 if isinstance(value, list) else str(value)[:200]


def odd_word(dice: Random) -> str:
    """An override, mostly of a key that there is."""
    key = (
        dice.choice([*names()])
        if dice.random() < 0.85
        else dice.choice(("", "a", "model.", ".", "model.heads.x", "é"))
    )
    return f"{key}={odd_text(dice)}".replace("\0", "")
