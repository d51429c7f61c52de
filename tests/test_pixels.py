"""Pixels: every depth and range by one rule or refused; which way up; what is no picture."""

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from spoiled import damaged_scans
from trees import encoded, packed, picture, tree

from shards import kinds
from shards.images import decode, holds_one_value, to_jpeg
from shards.jpeg import MAX_SCANS, plain_jpeg_size

GRAY = np.linspace(0, 255, 24 * 24).reshape(24, 24).astype(np.uint8)
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY.T], axis=2)


def png(values: NDArray[np.uint16], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits; (H, W, 1 to 4): gray, with opacity, colour, with opacity."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], 16, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def tiff(values: NDArray[np.generic], photometric: int, form: int = 1, planes: int = 1) -> bytes:
    """A little-endian TIFF of one strip; form: 1 unsigned, 2 signed, 3 fractions."""
    height, width, channels = values.shape
    bits, data = values.dtype.itemsize * 8, values.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8),
            (277, channels), (278, height), (279, len(data)), (284, planes),
            (339, form)]  # fmt: skip
    repeated, end = {258, 339}, 8 + len(data)
    entries, extra = b"", b""
    at = end + 2 + 12 * len(tags) + 4
    for tag, value in tags:
        if tag in repeated and channels > 2:  # does not fit into the entry
            entries += struct.pack("<HHII", tag, 3, channels, at + len(extra))
            extra += struct.pack("<H", value) * channels
        else:
            entries += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<I", end) + data + struct.pack("<H", len(tags)) + entries + (
        bytes(4) + extra
    )  # fmt: skip


def up(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint16]:
    """8-bit values over the whole range of more bits."""
    return (values.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)


def opaque_half(values: NDArray[np.uint16], bits: int) -> NDArray[np.uint16]:
    """Values with an opacity beside them, of all or none."""
    opacity = np.zeros((24, 24, 1), np.uint16)
    opacity[:, :12] = 2**bits - 1
    return np.concatenate([values, opacity], axis=2)


HALF = np.where(np.arange(24)[None, :, None] < 12, COLOUR, 0)
WHITE = (GRAY > 100).astype(np.uint8) * 255
KEYED = np.where(GRAY[5, 5] == GRAY, 0, GRAY)
RGB8, GRAY8 = COLOUR, np.repeat(GRAY[..., None], 3, axis=2)


def palette() -> bytes:
    image = Image.fromarray(GRAY // 64).convert("L")
    image = image.convert("P")
    image.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 250, 250, 250])
    return encoded(image, "PNG", transparency=2)


def lab() -> bytes:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return encoded(ImageCms.profileToProfile(picture(3), *profiles, outputMode="LAB"), "TIFF")


VALUES: dict[str, tuple[Callable[[], bytes], NDArray[np.generic]]] = {  # name → file, pixels
    "gray of 10 bits in a PNG": (lambda: png(up(GRAY, 10)[..., None]), GRAY8),
    "gray of 16 bits": (lambda: png(up(GRAY, 16)[..., None]), GRAY8),
    "gray of 8 bits, stored in 16": (lambda: png(GRAY.astype(np.uint16)[..., None]), GRAY8),
    "gray of 14 bits in a TIFF": (lambda: encoded(Image.fromarray(up(GRAY, 14)), "TIFF"), GRAY8),
    "colours of 12 bits": (lambda: png(up(COLOUR, 12)), RGB8),
    "colours of 16 bits": (lambda: png(up(COLOUR, 16)), RGB8),
    "colours of 12 bits in a TIFF": (lambda: tiff(up(COLOUR, 12), 2), RGB8),
    "colours and opacity of 12 bits": (lambda: png(opaque_half(up(COLOUR, 12), 12)), HALF),
    "gray and opacity of 12 bits": (
        lambda: png(opaque_half(up(COLOUR, 12)[..., 2:], 16)), HALF[..., [2, 2, 2]],
    ),
    "one gray of 16 bits stands for nothing": (
        lambda: png(up(GRAY, 16)[..., None], (b"tRNS", up(GRAY, 16)[5, 5].astype(">u2").tobytes())),
        np.repeat(KEYED[..., None], 3, axis=2),
    ),
    "zero is white": (lambda: tiff(up(255 - GRAY, 16)[..., None], 0), GRAY8),
    "whole numbers of 32 bits": (
        lambda: encoded(Image.fromarray(GRAY.astype(np.int32) << 16), "TIFF"), GRAY8,
    ),
    "the upper half of unsigned 32 bits": (
        lambda: tiff((GRAY.astype(np.uint32) << 24)[..., None], 1), GRAY8,
    ),
    "fractions up to 1": (
        lambda: encoded(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"), GRAY8,
    ),
    "fractions that overshoot": (
        lambda: encoded(Image.fromarray((GRAY / 255 * 1.04 - 0.02).astype(np.float32)), "TIFF"),
        (np.rint(GRAY8 * 1.04 - 5.1)).clip(0, 255),
    ),
    "fractions up to 255": (
        lambda: encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), GRAY8,
    ),
    "gray of 16 bits in a PGM": (lambda: b"P5 24 24 1023\n" + up(GRAY, 10).astype(">u2").tobytes(),
                                 GRAY8),
    "one bit": (lambda: encoded(Image.fromarray(WHITE).convert("1"), "TIFF"),
                np.repeat(WHITE[..., None], 3, axis=2)),
    "a palette with nothing in it": (
        palette, np.repeat(np.array([0, 80, 0, 250])[GRAY // 64][..., None], 3, axis=2),
    ),
    "CMYK": (lambda: encoded(picture(3, mode="CMYK"), "TIFF"), np.asarray(picture(3))),
    "CIELAB": (lab, np.asarray(picture(3))),
}  # fmt: skip


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_depth_are_mapped_by_one_rule(kind: str) -> None:
    make, expected = VALUES[kind]
    found = np.asarray(decode(make())).astype(int)
    assert found.shape == (24, 24, 3)
    if kind == "CIELAB":  # 8 bits in another space
        assert np.abs(found - expected).mean() < 2
    else:
        assert np.abs(found - expected).max() <= 1
    packed_pixels = np.asarray(decode(to_jpeg(make(), 24)[0])).astype(int)
    assert np.abs(packed_pixels - expected).mean() < 6  # as packing and prediction keep it


@pytest.mark.parametrize("adobe", [False, True])
def test_inks_of_a_jpeg_are_read_as_adobe_stores_them(adobe: bool) -> None:
    jpeg = encoded(picture(3, mode="CMYK"), "JPEG", quality=95, subsampling=0)
    at = jpeg.index(b"\xff\xee")
    without = jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]
    found = np.asarray(decode(jpeg if adobe else without)).astype(int)
    assert np.abs(found - np.asarray(picture(3))).mean() < 2


def floats(*values: float) -> bytes:
    return encoded(Image.fromarray(np.resize(np.float32(values), (24, 24))), "TIFF")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (floats(0, np.nan), "not all finite"),
        (floats(0, np.inf), "not all finite"),
        (floats(-1, 1), "from -1 to 1, expected 0 to 1 or 0 to 255"),
        (floats(0, 5), "from 0 to 5, expected"),
        (floats(0, 1e6), "from 0 to 1e\\+06, expected"),
        (encoded(Image.fromarray(GRAY.astype(np.int32) - 9), "TIFF"), "from -9 to 246"),
        (tiff(GRAY.astype(np.int8)[..., None], 1, form=2), "values are signed"),
        (tiff(up(COLOUR, 16), 2, planes=2), "lie apart"),
    ],
)
def test_values_that_no_rule_maps_are_refused(data: bytes, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        decode(data)


def exif(value: bytes, kind: int, order: str = "<") -> bytes:
    """An EXIF block with an orientation of this type, and a width that is text before it."""
    mark = {"<": b"II", ">": b"MM"}[order]
    width = struct.pack(f"{order}HHI", 0x0100, 2, 2) + b"a\0\0\0"
    own = struct.pack(f"{order}HHI", 0x0112, kind, 1) + value.ljust(4, b"\0")
    head = mark + struct.pack(f"{order}HI", 42, 8)
    return b"Exif\0\0" + head + struct.pack(f"{order}H", 2) + width + own + bytes(4)


def short(value: int, order: str = "<") -> bytes:
    return exif(struct.pack(f"{order}H", value), 3, order)


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:tiff='t'>%b</x:xmpmeta>"


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


SPELLINGS = {  # in a JPEG → turned or not
    "short": (short(6), True),
    "short, big-endian": (short(6, ">"), True),
    "long, big-endian": (exif(struct.pack(">I", 6), 4, ">"), True),
    "byte, big-endian": (exif(b"\6", 1, ">"), True),
    "text": (exif(b"6\0", 2), False),
    "fraction": (exif(struct.pack("<I", 6), 5), False),
    "0": (short(0), False),
    "9": (short(9), False),
    "1": (short(1), False),
    "XMP, attribute": (XMP % b'<rdf:Description tiff:Orientation="6"/>', True),
    "XMP, other quotes": (XMP % b"<rdf:Description tiff:Orientation = '6'/>", True),
    "XMP, element": (XMP % b"<tiff:Orientation>6</tiff:Orientation>", True),
    "XMP, 9": (XMP % b"<tiff:Orientation>9</tiff:Orientation>", False),
    "no EXIF in its segment": (b"Exif\0\0garbage", False),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_orientation_counts_in_every_spelling_or_in_none(spelling: str) -> None:
    """A JPEG of the wanted size, whose bytes may be kept, and of another are turned alike."""
    segment, is_turned = SPELLINGS[spelling]
    jpeg = encoded(picture(3), "JPEG", quality=95, subsampling=0)
    stored = np.asarray(decode(jpeg)).astype(int)
    data = with_segment(jpeg, segment)
    expected = np.rot90(stored, -1) if is_turned else stored
    assert (np.asarray(decode(data)) == expected).all()
    kept, is_original = to_jpeg(data, 24)
    assert is_original == (not is_turned) and (plain_jpeg_size(data) is None) == is_turned
    assert np.abs(np.asarray(decode(kept)) - expected).mean() < 6
    other = np.asarray(decode(to_jpeg(data, 48)[0]).resize((24, 24), Image.Resampling.BOX))
    assert np.abs(other - expected).mean() < 6 < np.abs(other - np.rot90(expected)).mean()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {"exif": short(6, ">")}),
        ("WEBP", {"exif": short(6), "lossless": True}),
        (
            "AVIF",
            {
                "exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6" + bytes(7),
                "quality": 100,
                "subsampling": "4:4:4",
            },
        ),
        ("TIFF", {"tiffinfo": {274: 6}}),
        ("WEBP", {"xmp": XMP % b'<r tiff:Orientation="6"/>', "lossless": True}),
    ],
)
def test_every_format_is_turned_upright(form: str, options: dict[str, object]) -> None:
    found = np.asarray(decode(encoded(picture(3), form, **options))).astype(int)
    assert np.abs(found - np.rot90(np.asarray(picture(3)), -1)).mean() < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_without_their_end_are_whole(options: dict[str, bool], mode: str) -> None:
    """Every viewer shows them; where data are missing too, they are damaged."""
    jpeg = encoded(picture(3, mode=mode), "JPEG", **options)
    for missing in (1, 2):
        assert (np.asarray(decode(jpeg[:-missing])) == np.asarray(decode(jpeg))).all()
        if mode != "CMYK":
            assert to_jpeg(jpeg[:-missing], 24) == (jpeg, False)
    for damaged in (jpeg[:-3], damaged_scans(jpeg)["cut"]):
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode(damaged)


def test_a_jpeg_has_a_bounded_number_of_scans() -> None:
    """By any way to repeat one; a picture of as many bytes in comments is none of that."""
    jpeg = encoded(picture(3), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    for between in (b"", b"stray", b"\xff\xff\xff"):
        many = jpeg[:last] + (between + jpeg[last:-2]) * MAX_SCANS + jpeg[-2:]
        for size in (24, 12):
            with pytest.raises(ValueError, match=f"more than {MAX_SCANS} scans"):
                to_jpeg(many, size)
    comment = b"\xff\xfe\x40\0" + b"\xff\xda" * 0x1FFF
    talkative = jpeg[:2] + comment * 4 + jpeg[2:]
    assert to_jpeg(talkative, 24) == (talkative, True)


@pytest.mark.parametrize("options", [{"no_jp2": True}, {}])
def test_a_jpeg_2000_that_lacks_what_its_header_tells_is_refused(options: dict[str, bool]) -> None:
    data = encoded(picture(3), "JPEG2000", **options)
    assert np.abs(np.asarray(decode(data)).astype(int) - np.asarray(picture(3))).mean() < 1
    size = struct.pack(">II", 240, 240)
    at = data.index(b"\xff\x51") + 6
    larger = data[:at] + size + data[at + 8 :]
    if not options:
        larger = larger.replace(b"ihdr" + struct.pack(">II", 24, 24), b"ihdr" + size)
    start = data.index(b"\xff\x93") + 2
    empty = data[:start] + bytes(len(data) - start - 2) + data[-2:]
    for damaged, line in ((larger, "1 of its 100 tiles"), (empty, "have one value"),
                          (data[:start] + b"\xff\xd9", "cannot be decoded")):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            decode(damaged)


def box(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"mif1" + bytes(40)


@pytest.mark.parametrize(
    ("data", "name", "line"),
    [
        (box(b"mp42"), "", "a video .*ffmpeg"),
        (box(b"qt  "), "", "QuickTime"),
        (b"\x1aE\xdf\xa3" + bytes(60), "", "Matroska"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(60), "", "a video .AVI"),
        (b"%PDF-1.7\n" + bytes(60), "", "a PDF"),
        (b"\n<!DOCTYPE html><html>" + bytes(60), "", "a web page"),
        (b"PK\x03\x04" + bytes(60), "", "zip"),
        (b"\x93NUMPY" + bytes(60), "", "NumPy"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(60), "", "AppleDouble"),
        (b"version https://git-lfs.github.com/spec/v1\n", "", "git lfs pull"),
        (b"\x08\x08\x12\x07pytorch" + bytes(60), "", "ONNX"),
        (b"\x08\x03" + bytes(60), "x.onnx", "ONNX"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, name: str, line: str) -> None:
    assert line.split(" .*")[0].replace(".AVI", "(AVI") in (kinds.describe(data[:64], name) or "")
    if not name:
        with pytest.raises(ValueError, match=f"cannot be decoded: .*{line}"):
            decode(data)


def test_heic_is_read_by_pillow_heif_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    for brand in (b"heic", b"mif1"):
        with pytest.raises(ValueError, match=r"a picture in HEIC, .*pip install pillow-heif"):
            decode(box(brand))


def test_images_of_one_value_are_named_as_they_are_packed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tree(tmp_path / "source")
    (source / "train" / "angry" / "3.jpg").write_bytes(encoded(Image.new("L", (24, 24)), "JPEG"))
    for path in (source / "val" / "happy").iterdir():
        path.write_bytes(encoded(Image.new("RGB", (30, 30), "navy"), "PNG"))
    with caplog.at_level(logging.WARNING):
        packed(source, tmp_path / "out")
    assert "in 1 of 18 images of split 'train' all pixels have one value: train/angry_3" in (
        caplog.text
    )
    assert "in 3 of 6 images of split 'val'" in caplog.text
    assert "so have all images of class 'happy'" in caplog.text and "'angry'\n" not in caplog.text
    assert not holds_one_value(encoded(picture(1), "JPEG"))
