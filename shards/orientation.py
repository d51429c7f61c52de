"""Which way up a picture is to be shown: one rule for every format, JPEGs kept as they are too.

EXIF's orientation counts where it is a whole number from 1 to 8, else XMP's, else the picture
stands as it is stored. Cameras and programs also write 0, 9, text and fractions.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from PIL import Image

EXIF_HEADER, XMP_HEADER = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # in a JPEG
UPRIGHT = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TAG = 0x0112
_SIZES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4}  # bytes of EXIF's types that are whole numbers
_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])(?![0-9])")


def orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8, of an EXIF block (a TIFF header and its directories) and a text in XMP."""
    found = _XMP.search(xmp)
    return _of_exif(exif) or (int(found[1]) if found else UPRIGHT)


def upright(image: Image.Image, form: str | None, info: Mapping[Any, Any]) -> Image.Image:
    """A picture, turned as the metadata of its file ask for; form: the file's, as Pillow names it.

    Pillow turns a TIFF by itself as it loads it.
    """
    turn = None if form == "TIFF" else TURNS.get(orientation(*_metadata(info)))
    return image if turn is None else image.transpose(turn)


def _metadata(info: Mapping[Any, Any]) -> tuple[bytes, bytes]:
    """EXIF and XMP as Pillow's readers keep them."""
    exif = info.get("exif") or b""
    if not exif and "Raw profile type exif" in info:  # of a PNG by ImageMagick
        digits = "".join(str(info["Raw profile type exif"]).split("\n")[3:])
        exif = bytes.fromhex(digits) if re.fullmatch(r"([0-9a-fA-F]{2})*", digits) else b""
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    return exif.removeprefix(EXIF_HEADER), xmp.encode() if isinstance(xmp, str) else xmp


def _of_exif(tiff: bytes) -> int | None:
    """The orientation in a block's first directory; None: there is none from 1 to 8."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    start = number(4, 4)
    for k in range(min(number(start, 2), 1000)):
        entry = start + 2 + 12 * k
        if number(entry, 2) == _TAG:
            size = _SIZES.get(number(entry + 2, 2))
            value = number(entry + 8, size) if size else 0
            return value if 1 <= value <= 8 else None
    return None
