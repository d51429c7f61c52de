"""JPEG bytes, looked at without decoding them, or decoded strictly."""

import re
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.orientation import EXIF_HEADER, UPRIGHT, XMP_HEADER, orientation

SOI, SOS, EOI = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
MAX_SCANS = 100  # a progressive JPEG has some ten; each costs as much as a picture

_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended sequential, progressive; Huffman coded
_NO_LENGTH = {0x01, *range(0xD0, 0xD8)}
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a scan's data
_LOST = "remature end"  # of a scan or of the file; stray bytes are common on the web


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that any decoder reads alike, else None; nothing is decoded.

    Plain: 8 bits, grayscale or YCbCr, baseline or progressive, from SOI to an EOI at the very end,
    upright by EXIF and XMP, with tables and a first scan that is not empty. Walks the markers up
    to that scan, a few µs; `jpeg_fault` checks the scan's data.
    """
    if not data.startswith(SOI) or not data.endswith(EOI):
        return None
    size, at = None, 2
    wanted: set[int] = set()
    tables: set[int] = set()
    has_codes, exif, xmp = False, b"", b""
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _NO_LENGTH:  # fill byte, or a marker without a segment
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker == 0xDA:  # start of scan: what follows is image data
            is_whole = has_codes and wanted <= tables and at + 2 + length < len(data) - 2
            return size if is_whole and orientation(exif, xmp) == UPRIGHT else None
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
        elif marker == 0xE1 and segment.startswith(EXIF_HEADER):
            exif += segment.removeprefix(EXIF_HEADER)  # a long block stands in several segments
        elif marker == 0xE1 and segment.startswith(XMP_HEADER):
            xmp = segment.removeprefix(XMP_HEADER)
        elif marker == 0xEE and segment[:5] == b"Adobe" and segment[11:12] == b"\0":
            return None  # Adobe's transform 0: stored as RGB or CMYK
        at += 2 + length
    return None


def _table_numbers(segment: bytes) -> Iterator[int]:
    at = 0
    while at < len(segment):
        yield segment[at] & 15
        at += 129 if segment[at] >> 4 else 65


def small_gray(jpeg: bytes, side: int) -> NDArray[np.uint8]:
    """A JPEG's brightness, (height, width), from all of its data, by a strict decoder.

    At an eighth to the whole of its size: the smallest of which both sides have `side` pixels.

    Raises:
        ValueError: its image data are damaged; other decoders show the rest in silence.
    """
    gray: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        jpeg, "GRAY", min_height=side, min_width=side, min_factor=1, strict=True
    )
    return gray[:, :, 0]


def jpeg_fault(jpeg: bytes) -> str | None:
    """A strict decoder's error on a JPEG's image data, or None.

    Decodes to an eighth of the size, which is a third of the work.
    """
    try:
        small_gray(jpeg, 1)
    except ValueError as error:
        return str(error)
    return None


def completed_jpeg(data: bytes) -> bytes:
    """A JPEG that lacks its last two bytes or one of them, with these; any other as it is.

    Every viewer shows such a file whole. Where more is missing, `lost_data` finds it.
    """
    if not data.startswith(SOI) or EOI in data[-64:]:  # at the end, or before stray bytes
        return data
    mended = data.removesuffix(EOI[:1]) + EOI
    return mended if jpeg_fault(mended) is None else data


def lost_data(jpeg: bytes) -> str | None:
    """A strict decoder's error where part of the picture is missing, which decoders fill up."""
    fault = jpeg_fault(jpeg)
    return fault if fault and _LOST in fault else None


def check_scans(jpeg: bytes) -> None:
    """ValueError for more scans than MAX_SCANS: minutes of work for a file of any size."""
    at, scans = len(SOI), 0
    while found := _MARKER.search(jpeg, at):
        marker, at = jpeg[found.start() + 1], found.end()
        if marker == EOI[1]:
            return
        if marker not in _NO_LENGTH:
            at += int.from_bytes(jpeg[at : at + 2], "big")
        scans += marker == SOS[1]
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans, which are not decoded")
