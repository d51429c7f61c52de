"""Which image bytes may go into a shard as they are, and how the others are made fit.

One reader for all: packing, predict, explain, align, serving and the sheets of `show` get the same
pixels of the same bytes. `pixels` maps their values, `orientation` turns them.
"""

import io
from collections import Counter

from PIL import Image, UnidentifiedImageError, features

from shards.jpeg import SOI, check_scans, completed_jpeg, lost_data, plain_jpeg_size
from shards.jpeg2000 import check_tiles
from shards.kinds import HEAD_BYTES, describe, media_picture
from shards.orientation import upright
from shards.pixels import WHITE, is_flat, to_rgb

JPEG_QUALITY = 95
# Not all that Pillow knows: its EPS reader, for one, starts Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000",
           *(("AVIF",) if features.check("avif") else ()))  # fmt: skip
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
     ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".heic", ".heif")
)  # fmt: skip
MAX_PIXELS = 100_000_000  # beyond this a file is refused unread: an image bomb, or not a face
MAX_BYTES = 4 * MAX_PIXELS  # of a file

_FLAT_BYTES = 1 / 16  # a pixel: a plain JPEG of one value has fewer, one of a face has more


def to_jpeg(
    source: bytes | Image.Image, size: int | None, whites: Counter[int] | None = None
) -> tuple[bytes, bool]:
    """JPEG bytes for a shard, and whether they are the original ones; ValueError as of `decode`.

    The original bytes are kept where they are a plain JPEG of size×size pixels (of any size where
    `size` is None); one that lacks its last two bytes gets them. Everything else is decoded, turned
    upright, mapped to 8-bit RGB (the first frame of an animation), resized bilinearly as
    torchvision's Resize, and encoded at quality 95 without chroma subsampling.

    whites: counts the value that was taken for white, where the format fixes none.
    """
    if isinstance(source, bytes):
        if (jpeg := kept_jpeg(source, size)) is not None:
            return jpeg, len(jpeg) == len(source)
        image = decode(source)
    else:
        image = source if source.mode in ("RGB", "L") else to_rgb(source)
    if whites is not None and WHITE in image.info:
        whites[image.info[WHITE]] += 1
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return encode(image), False


def kept_jpeg(data: bytes, size: int | None) -> bytes | None:
    """The bytes of a JPEG that goes into a shard as it is, see `to_jpeg`; None: it is another."""
    jpeg = checked_jpeg(data)
    plain = plain_jpeg_size(jpeg)
    if plain is None:
        return None
    _check_pixels(*plain)
    if not (min(plain) > 0 and size in (None, plain[0]) and size in (None, plain[1])):
        return None
    if fault := lost_data(jpeg):
        raise ValueError(f"cannot be decoded: {fault}")
    return jpeg


def encode(image: Image.Image) -> bytes:
    """An RGB or grayscale image as JPEG, quality 95, 4:4:4."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The picture as RGB, upright; ValueError: no image, damaged, or of more than MAX_PIXELS."""
    if not data:
        raise ValueError("the file is empty")
    data = checked_jpeg(data)
    try:
        with Image.open(io.BytesIO(data), formats=_formats(data)) as image:
            _check_pixels(*image.size)
            if data.startswith(SOI) and (fault := lost_data(data)):
                raise ValueError(f"cannot be decoded: {fault}")
            if image.format == "JPEG2000":
                check_tiles(data)
            found = to_rgb(image, data)
            image.load()  # a PNG's orientation may stand behind its pixels
            if image.format == "JPEG2000" and is_flat(found):  # OpenJPEG fills up what is not there
                raise ValueError("cannot be decoded: all its pixels have one value")
            return upright(found, image.format, image.info)
    except UnidentifiedImageError as error:  # its own text holds a memory address
        kind = describe(data[:HEAD_BYTES]) or f"none of {', '.join(FORMATS)}"
        raise ValueError(f"cannot be decoded: {kind}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise ValueError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def checked_jpeg(data: bytes) -> bytes:
    """A JPEG of a bounded number of scans, with its last two bytes; other data as they are."""
    if not data.startswith(SOI):
        return data
    check_scans(data)
    return completed_jpeg(data)


def holds_one_value(jpeg: bytes) -> bool:
    """Whether all pixels of a JPEG for a shard are the same; most are told by their size alone."""
    size = plain_jpeg_size(jpeg)
    if size is None or len(jpeg) > 2000 + size[0] * size[1] * _FLAT_BYTES:
        return False
    try:
        return is_flat(decode(jpeg))
    except ValueError:  # damage is for others to find
        return False


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels, at most {MAX_PIXELS} are read")


def _formats(data: bytes) -> tuple[str, ...]:
    """The formats that a file may have; for HEIC, Pillow is taught to read it."""
    if media_picture(data[:HEAD_BYTES]) != "HEIC":
        return FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise ValueError("cannot be decoded: a picture in HEIC, which pillow-heif reads: "
                         "pip install pillow-heif") from error  # fmt: skip
    register_heif_opener()
    return ("HEIF",)
