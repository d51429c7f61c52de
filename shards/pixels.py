"""The values of a picture's pixels as 8-bit RGB: one rule for every depth and range, or a refusal.

- 8 bits and fewer stay as they are (1 bit: black and white).
- Whole numbers of more bits keep their upper 8: of the depth that the format fixes, or else of the
  smallest of 8, 10, 12, 14, 16, 24 and 32 bits that holds the picture's largest value: a guess,
  which makes a dark picture lighter, and which `WHITE` tells.
- Fractions are from 0 to 1, or from 0 to the largest value of such a depth, 8 bits among them.
- Transparency lies on black. CMYK is converted without a profile, CIELAB to sRGB.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits
OVERSHOOT = 0.1  # of fractions: resampling leaves some per cent, which are cut off
WHITE = "white, by guess"  # in a picture's info: the value taken for white, where none is fixed
DARKEST = 16  # of fractions up to 255: a picture below is rather one of 0 to 1, and too bright

_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF's tags
_WHITE_IS_ZERO, _APART, _SIGNED = 0, 2, 2  # values of the last three


def to_rgb(image: Image.Image, data: bytes | None = None) -> Image.Image:
    """RGB, or gray where there is no colour; ValueError: values that no rule maps.

    data: the file that the picture was opened from and not loaded yet; Pillow drops the lower bytes
    of colours of 16 bits, so that they are read again.
    """
    values = None if data is None else _deep_colours(image, data)
    if values is None and (image.mode.startswith("I") or image.mode == "F"):
        values = np.asarray(image)[..., None]
    if values is not None:
        image = _mapped(image, values)
    elif image.format == "TIFF" and image.mode == "L" and _SIGNED in _tag(image, _SAMPLE_FORMAT):
        raise ValueError("its values are signed, expected 0 and more")
    elif image.mode == "LAB":
        image = _from_lab(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert("RGB")


def is_flat(image: Image.Image) -> bool:
    """Whether all pixels have one value, as those of a picture that was spoilt mostly have."""
    extrema = image.getextrema()
    bands = [extrema] if len(image.getbands()) == 1 else extrema
    return all(low == high for low, high in bands)  # type: ignore[misc]


def to_bytes(values: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """Values of any depth as 8 bits; white: the largest that they might have, see `find_white`."""
    if values.dtype.kind != "f":
        upper: NDArray[np.uint8] = (values >> (white.bit_length() - 8)).astype(np.uint8)
        return upper
    scaled = np.rint(values * np.float32(255 / white))
    whole: NDArray[np.uint8] = scaled.clip(0, 255).astype(np.uint8)
    return whole


def find_white(values: NDArray[Any], bits: int | None = None) -> int:
    """The value that stands for white; bits: the values' depth, where the format fixes it.

    Raises:
        ValueError: negative or infinite values, or fractions of no known range.
    """
    low, high = values.min().item(), values.max().item()
    if not np.isfinite([low, high]).all():
        raise ValueError("its values are not all finite")
    if values.dtype.kind != "f":
        if low < 0:
            raise ValueError(f"its values go from {low} to {high}, expected 0 and more")
        return (1 << (bits or next(b for b in DEPTHS if high < 1 << b))) - 1
    tops = [1, *((1 << b) - 1 for b in DEPTHS if b <= 16)]
    top = next((t for t in tops if high <= (1 + OVERSHOOT) * t), None)
    if top is None or low < -OVERSHOOT * top or (top > 1 and high < DARKEST):
        raise ValueError(f"its values go from {low:.4g} to {high:.4g}, expected 0 to 1 or 0 to 255")
    return top


def _mapped(image: Image.Image, values: NDArray[Any]) -> Image.Image:
    """8-bit gray or RGB, on black, of (H, W, 1 to 4) values: gray, colour, either with opacity."""
    colours = values[..., : 1 if values.shape[2] < 3 else 3]
    bits = None
    if image.format in ("PPM", "JPEG2000"):  # Pillow has scaled them
        bits = 16
    elif image.format == "TIFF":
        if _SIGNED not in _tag(image, _SAMPLE_FORMAT) and colours.dtype == np.int32:
            colours = colours.view(np.uint32)
        bits = next((b for b in _tag(image, _BITS) if b == 12), None)
    white = find_white(colours, bits)
    mapped = to_bytes(colours, white)
    if image.format == "TIFF" and _WHITE_IS_ZERO in _tag(image, _PHOTOMETRIC):
        mapped = 255 - mapped
    if values.shape[2] in (2, 4):
        opacity = to_bytes(values[..., -1:], find_white(values[..., -1:])).astype(np.float32) / 255
        mapped = np.rint(mapped * opacity).astype(np.uint8)
    elif (key := image.info.get("transparency")) is not None and not isinstance(key, bytes):
        mapped[(colours == np.asarray(key)).all(axis=2)] = 0  # one value stands for nothing
    found = Image.fromarray(mapped[..., 0] if mapped.shape[2] == 1 else mapped)
    if bits is None:
        found.info[WHITE] = white
    return found


def _deep_colours(image: Image.Image, data: bytes) -> NDArray[Any] | None:
    """(H, W, 2 to 4) values of a picture with several channels of 16 bits; None: it has fewer.

    Pillow unpacks the upper bytes alone, or, given the other order of bytes, the lower ones alone.
    """
    deep = max(_tag(image, _BITS), default=0) > 8
    if deep and len(image.getbands()) > 1 and _tag(image, _PLANES) == (_APART,):
        raise ValueError("its channels of 16 bits lie apart, expected them pixel by pixel")
    tiles = getattr(image, "tile", None)  # how the file is to be unpacked; none of a new image
    mode, depth, order = _raw_mode(tiles[0].args if tiles else "").partition(";16")
    if not depth or order not in ("B", "L", "N"):
        return None
    if mode == "LA":
        return _unpacked(image, data, "RGBA").view(">u2").astype(np.uint16)
    if mode not in ("RGB", "RGBX", "RGBA", "RGBa"):
        return None
    opaque = mode == "RGBa"  # colours that are multiplied by their opacity lie on black already
    mode = "RGBA" if opaque else mode
    other = "L" if order == "B" else "B"  # N, the machine's own, is little on all that DALI runs on
    upper = _unpacked(image, data, f"{mode};16{order}").astype(np.uint16)
    values = upper << 8 | _unpacked(image, data, f"{mode};16{other}")
    return values[..., :3] if opaque else values


def _unpacked(image: Image.Image, data: bytes, raw_mode: str) -> NDArray[np.uint8]:
    """The bytes of a picture that is opened again, and unpacked in another way."""
    with Image.open(io.BytesIO(data), formats=[image.format or ""]) as again:
        again.tile = [tile._replace(args=_renamed(tile.args, raw_mode)) for tile in again.tile]
        return np.asarray(again)


def _raw_mode(arguments: Any) -> str:
    """How a decoder unpacks: the argument of Pillow's tile, or the first of several."""
    if isinstance(arguments, tuple) and arguments:
        arguments = arguments[0]
    return str(arguments)


def _renamed(arguments: Any, raw_mode: str) -> Any:
    return raw_mode if isinstance(arguments, str) else (raw_mode, *arguments[1:])


def _tag(image: Image.Image, number: int) -> tuple[int, ...]:
    """The values of a TIFF's tag."""
    found = getattr(image, "tag_v2", {}).get(number, ())
    return found if isinstance(found, tuple) else (found,)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    found = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert found is not None
    return found
