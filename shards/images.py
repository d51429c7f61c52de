"""Which image bytes may go into a shard as they are, and how the others are made fit."""

import io
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

JPEG_QUALITY = 95
# Not all that Pillow knows: its EPS reader, for one, starts Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
MAX_PIXELS = 100_000_000  # beyond this a file is refused unread: an image bomb, or not a face

_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended sequential, progressive; Huffman coded
_NO_LENGTH = {0x01, *range(0xD0, 0xD8)}
_LOST = "remature end"  # of a scan or of the file; stray bytes are common on the web
_ORIENTATION_TAG = b"\x12\x01", b"\x01\x12"  # little endian, big endian


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that any decoder reads alike, else None; nothing is decoded.

    Plain: 8 bits, grayscale or YCbCr, baseline or progressive, from SOI to an EOI at the very end,
    no EXIF rotation, with tables and a first scan that is not empty. Walks the markers up to that
    scan, a few µs; `jpeg_fault` checks the scan's data.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    size, at = None, 2
    wanted: set[int] = set()
    tables: set[int] = set()
    has_codes = False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _NO_LENGTH:  # fill byte, or a marker without a segment
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker == 0xDA:  # start of scan: what follows is image data
            is_whole = has_codes and wanted <= tables and at + 2 + length < len(data) - 2
            return size if is_whole else None
        if marker == 0xC4:  # Huffman tables
            has_codes = True
        elif marker == 0xDB:  # quantisation tables: their number, then 64 values of 8 or 16 bits
            tables.update(_table_numbers(segment))
        elif marker in _FRAMES and len(segment) >= 6:
            bits, components = segment[0], segment[5]
            is_rgb = segment[6:7] == b"R"  # the first component's id: not YCbCr
            if bits != 8 or components not in (1, 3) or (components == 3 and is_rgb):
                return None
            wanted.update(segment[8::3])
            size = int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[1:3], "big")
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless, arithmetic or hierarchical coding
        elif marker == 0xE1 and segment[:6] == b"Exif\0\0" and _is_rotated(segment[6:]):
            return None
        elif marker == 0xEE and segment[:5] == b"Adobe" and segment[11:12] == b"\0":
            return None  # Adobe's transform 0: stored as RGB or CMYK
        at += 2 + length
    return None


def _table_numbers(segment: bytes) -> Iterator[int]:
    at = 0
    while at < len(segment):
        yield segment[at] & 15
        at += 129 if segment[at] >> 4 else 65


def jpeg_fault(jpeg: bytes) -> str | None:
    """A strict decoder's error on a JPEG's image data; other decoders show the rest in silence.

    Decodes to an eighth of the size, which is a third of the work.
    """
    try:
        simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return None


def _is_rotated(tiff: bytes) -> bool:
    """Whether an EXIF block's first directory holds an orientation other than 1."""
    order: str = "little" if tiff[:2] == b"II" else "big"
    tag = _ORIENTATION_TAG[order == "big"]

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)  # type: ignore[arg-type]

    start = number(4, 4)
    for k in range(min(number(start, 2), 1000)):
        entry = start + 2 + 12 * k
        if tiff[entry : entry + 2] == tag:
            return number(entry + 8, 2) > 1
    return False


def to_jpeg(source: bytes | Image.Image, size: int | None) -> tuple[bytes, bool]:
    """JPEG bytes for a shard, and whether they are the original ones; ValueError as of `decode`.

    The original bytes are kept where they are a plain JPEG of size×size pixels (of any size where
    `size` is None). Everything else is decoded, turned upright, converted to RGB (transparency on
    black; the first frame of an animation), resized bilinearly as torchvision's Resize, and encoded
    at quality 95 without chroma subsampling.
    """
    if isinstance(source, bytes):
        plain = plain_jpeg_size(source)
        if plain and plain[0] * plain[1] > MAX_PIXELS:
            raise ValueError(f"{plain[0]}×{plain[1]} pixels, at most {MAX_PIXELS} are read")
        if plain and min(plain) > 0 and size in (None, plain[0]) and size in (None, plain[1]):
            return source, True
        image = decode(source)
    else:
        image = source if source.mode in ("RGB", "L") else _to_rgb(source)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return encode(image), False


def encode(image: Image.Image) -> bytes:
    """An RGB or grayscale image as JPEG, quality 95, 4:4:4."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The picture as RGB, upright; ValueError: no image, damaged, or of more than MAX_PIXELS."""
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width}×{image.height} pixels, at most {MAX_PIXELS} are read"
                )
            if image.format == "JPEG" and (fault := jpeg_fault(data)) and _LOST in fault:
                raise ValueError(f"cannot be decoded: {fault}")
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:  # its own text holds a memory address
        raise ValueError(f"cannot be decoded: none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise ValueError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16 bits: keep the upper 8
        return Image.fromarray(
            (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert("RGB")
