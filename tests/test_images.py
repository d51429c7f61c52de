"""Images: which bytes are kept, how the others are made fit, which are refused."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from spoiled import damaged_scans
from trees import encoded, picture

from shards.images import decode, to_jpeg
from shards.jpeg import plain_jpeg_size


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif.tobytes())


KINDS: dict[str, tuple[Callable[[], bytes], bool]] = {  # name → bytes, kept as they are
    "plain": (lambda: encoded(picture(0), "JPEG"), True),
    "progressive": (lambda: encoded(picture(0), "JPEG", progressive=True), True),
    "gray": (lambda: encoded(picture(0, mode="L"), "JPEG"), True),
    "4:4:4": (lambda: encoded(picture(0), "JPEG", subsampling=0), True),
    "with EXIF, upright": (lambda: encoded(picture(0), "JPEG", exif=Image.Exif().tobytes()), True),
    "other size": (lambda: encoded(picture(0, (31, 17)), "JPEG"), False),
    "rotated by EXIF": (lambda: rotated(picture(0)), False),
    "trailing junk": (lambda: encoded(picture(0), "JPEG") + b"junk", False),
    "CMYK": (lambda: encoded(picture(0, mode="CMYK"), "JPEG"), False),
    "PNG": (lambda: encoded(picture(0), "PNG"), False),
    "16-bit PNG": (
        lambda: encoded(Image.fromarray(np.full((24, 24), 40_000, np.uint16)), "PNG"),
        False,
    ),
    "transparent": (lambda: encoded(picture(0, mode="RGBA"), "PNG"), False),
    "animated GIF": (
        lambda: encoded(picture(0), "GIF", save_all=True, append_images=[picture(1)]),
        False,
    ),
    "palette GIF": (lambda: encoded(picture(0, mode="P"), "GIF"), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_and_what_is_encoded_anew(kind: str) -> None:
    make, kept = KINDS[kind]
    data = make()
    jpeg, verbatim = to_jpeg(data, 24)
    assert verbatim == kept and (jpeg == data) == kept
    assert plain_jpeg_size(jpeg) == (24, 24)
    image = Image.open(io.BytesIO(jpeg))
    assert image.mode in ("RGB", "L")
    if kind == "16-bit PNG":
        assert abs(np.asarray(image).mean() - 40_000 / 256) < 2
    if kind == "rotated by EXIF":
        upright = np.asarray(picture(0).rotate(-90)).astype(int)
        assert np.abs(np.asarray(image).astype(int) - upright).mean() < 10
    if kind == "other size":
        whole = picture(0, (31, 17)).resize((24, 24), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(whole).astype(int)).mean() < 10
        assert to_jpeg(data, None) == (data, True)  # native sizes keep it


@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8])
def test_a_turned_heic_is_read_upright(orientation: int) -> None:
    """Once: its reader turns it, and the orientation in its EXIF does not turn it again."""
    heif = pytest.importorskip("pillow_heif", reason="pip install -e '.[heic]' reads them")
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph, buffer = picture(3, (64, 40)), io.BytesIO()
    heif.from_pillow(photograph).save(buffer, quality=-1, exif=exif.tobytes())
    jpeg = encoded(photograph, "JPEG", quality=95, subsampling=0, exif=exif.tobytes())
    found, expected = (np.asarray(decode(data)).astype(int) for data in (buffer.getvalue(), jpeg))
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 4


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "L"])
def test_images_made_in_memory_need_not_be_rgb(mode: str) -> None:
    jpeg, verbatim = to_jpeg(picture(0, (30, 30), mode), 24)
    assert not verbatim and plain_jpeg_size(jpeg) == (24, 24)


def bad_exif() -> bytes:
    """To be turned upright, and beside it a width that is text."""
    width, turned = b"\1\0\0\2\0\0\0\2a\0\0\0", b"\1\x12\0\3\0\0\0\1\0\6\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + width + turned + bytes(4)
    return encoded(picture(0), "JPEG", exif=exif)


def bad_tiff() -> bytes:
    """Its pixels stand at an offset that is no whole number."""
    tiff = encoded(picture(0), "TIFF")
    entry = tiff.index(struct.pack("<HHI", 273, 4, 1))
    return tiff[: entry + 2] + struct.pack("<HIf", 11, 1, 8.5) + tiff[entry + 12 :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bad_tiff(),
        b"\xff\xd8\xff\xc0\x00\x08\x08\x00\x18\x00\x18\x03\xff\xd9",
        b"GIF89a",
        b"<html>",
        encoded(picture(0), "JPEG")[:300],
        bytes(500),
    ],
)
def test_unreadable_bytes_are_refused(data: bytes) -> None:
    assert plain_jpeg_size(data) is None
    with pytest.raises(ValueError, match=r"cannot be decoded|is empty"):
        to_jpeg(data, 24)


@pytest.mark.parametrize("kind", ["no scan", "no table"])
def test_jpegs_that_lack_what_decoding_needs_are_no_plain_ones(kind: str) -> None:
    assert plain_jpeg_size(damaged_scans(encoded(picture(0), "JPEG"))[kind]) is None


def test_cut_jpegs_are_not_encoded_anew() -> None:
    jpeg = encoded(picture(0, (96, 96)), "JPEG", quality=95)
    for kind in ("cut", "no scan", "no table"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            to_jpeg(damaged_scans(jpeg)[kind], 24)


@pytest.mark.parametrize("size", [None, 96, 24])
def test_jpegs_that_lack_data_and_not_their_end_are_refused(size: int | None) -> None:
    jpeg = encoded(picture(0, (96, 96)), "JPEG", quality=95)
    assert to_jpeg(jpeg, size)[1] == (size != 24)
    with pytest.raises(ValueError, match=r"cannot be decoded: .*premature end of data"):
        to_jpeg(jpeg[: len(jpeg) // 2] + b"\xff\xd9", size)


def test_image_bombs_are_refused_undecoded() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ValueError, match=r"20000×20000 pixels|exceeds limit"):
        to_jpeg(bomb, 24)
