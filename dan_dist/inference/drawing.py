"""Pictures of predictions, for people to look at: class and probability at each face."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from shards.files import write_atomically
from shards.images import encode
from shards.releases.boxes import Box

SIDES = 256, 1600  # pixels of a picture's longer side, at least and at most
LEAST_TEXT = 15  # pixels
PADDING = 3  # pixels around a text
# Dark enough for white letters, and told apart by most who see colours differently (Paul Tol's)
COLOURS = ("#332288", "#117733", "#882255", "#8a5a00", "#004c6d", "#aa3377", "#5a5a00", "#444444")

Area = tuple[float, float, float, float]  # left, top, right, bottom


class Label(NamedTuple):
    """What is written at a face, or beneath the picture."""

    text: str
    box: Box | None  # of the face; None: the picture is a crop, or shows no face
    number: int | None  # of the face
    label: int  # of its class, which chooses the colour


def draw(picture: Image.Image, labels: Sequence[Label], path: Path) -> None:
    """Writes an upright RGB picture with its labels as a JPEG; OSError: it cannot be written."""
    least, most = SIDES
    longer = max(picture.size)
    scale = min(max(longer, least), most) / longer
    width, height = (max(1, round(side * scale)) for side in picture.size)
    sheet = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
    faces = [label for label in labels if label.box is not None]
    sheet = _with_faces(sheet, faces, scale) if faces else _with_line(sheet, labels[0].text)
    write_atomically(path, encode(sheet))


def _with_line(picture: Image.Image, text: str) -> Image.Image:
    """The picture above a line of text."""
    size = max(LEAST_TEXT, picture.width // 20)
    font = ImageFont.load_default(size)
    width = max(picture.width, round(font.getlength(text)) + 4 * PADDING)
    sheet = Image.new("RGB", (width, picture.height + round(1.6 * size)), "white")
    sheet.paste(picture)
    place = (2 * PADDING, picture.height + round(0.2 * size))
    ImageDraw.Draw(sheet).text(place, text, fill="black", font=font)
    return sheet


def _with_faces(picture: Image.Image, labels: Sequence[Label], scale: float) -> Image.Image:
    """The picture with boxes, each with its text where that hides no face, as far as there is."""
    canvas = ImageDraw.Draw(picture)
    line = max(2, max(picture.size) // 500)
    boxes: list[Area] = []
    for label in labels:
        assert label.box is not None
        left, top, width, height = (scale * edge for edge in label.box)
        boxes.append((left, top, left + width, top + height))
        canvas.rectangle(boxes[-1], outline="white", width=line + 2)
    taken: list[Area] = []
    for k, (label, box) in enumerate(zip(labels, boxes, strict=True)):
        colour = COLOURS[label.label % len(COLOURS)]
        canvas.rectangle([edge + (1, 1, -1, -1)[j] for j, edge in enumerate(box)], outline=colour,
                         width=line)  # fmt: skip
        text = f"{label.number}  {label.text}"
        size = max(LEAST_TEXT, min(picture.width // 30, round((box[2] - box[0]) / 7)))
        font = ImageFont.load_default(size)
        area = (font.getlength(text) + 2 * PADDING, 1.2 * size + 2 * PADDING)
        place = _place(box, area, [*boxes[:k], *boxes[k + 1 :]], taken, picture.size)
        taken.append(place)
        canvas.rectangle(place, fill=colour)
        canvas.text((place[0] + PADDING, place[1] + PADDING), text, fill="white", font=font)
    return picture


def _place(
    box: Area, size: tuple[float, float], others: list[Area], taken: list[Area],
    picture: tuple[int, int],
) -> Area:  # fmt: skip
    """Where a text of this size stands: above or below its face, or at its edge, within it."""
    width, height = size
    left = min(max(box[0], 0), max(picture[0] - width, 0))
    tops = (box[1] - height, box[3], box[3] - height, box[1])
    areas = [(left, top, left + width, top + height) for top in tops]
    within = [area for area in areas if area[1] >= 0 and area[3] <= picture[1]] or areas[-1:]

    def hidden(area: Area) -> tuple[float, float]:
        return sum(_common(area, t) for t in taken), sum(_common(area, o) for o in others)

    return min(within, key=hidden)


def _common(a: Area, b: Area) -> float:
    """The pixels that two areas share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
