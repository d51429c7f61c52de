"""Faces cut out of photographs by their boxes."""

from PIL import Image

Box = tuple[int, int, int, int]  # x, y, width, height in pixels


def crop_box(image: Image.Image, box: Box, margin: float) -> tuple[Image.Image, tuple[int, int]]:
    """The face, and where its upper left corner is in the photograph.

    margin: in parts of the box's width and height, on each side; what lies outside is cut off.

    Raises:
        ValueError: the whole box lies outside.
    """
    x, y, width, height = box
    left, top = max(x - margin * width, 0), max(y - margin * height, 0)
    right = min(x + (1 + margin) * width, image.width)
    bottom = min(y + (1 + margin) * height, image.height)
    edges = round(left), round(top), round(right), round(bottom)
    if edges[2] - edges[0] < 1 or edges[3] - edges[1] < 1:
        raise ValueError(f"the box {box} lies outside {image.size}")
    return image.crop(edges), edges[:2]
