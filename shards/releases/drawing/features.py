"""A head and its features, in the face's own coordinates, moved by action units.

Coordinates: x to the right and y down, the head about ±0.75 wide and ±1 high.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]
Color = tuple[int, int, int]
Units = dict[str, float]  # action unit → strength


class Person(NamedTuple):
    """The features that all images of a person share."""

    width: float
    jaw: float
    skin: Color
    hair: Color
    iris: Color
    lips: Color
    hair_style: int  # 0 none, 1 short, 2 long, 3 fringe
    eye_gap: float
    eye_size: float
    brow_width: float
    brow_height: float
    nose_length: float
    nose_width: float
    mouth_width: float
    lip: float
    beard: float
    glasses: bool


class Canvas:
    """Draws in face coordinates through one affine map."""

    def __init__(self, image: Image.Image, matrix: Points, offset: Points) -> None:
        self.pen = ImageDraw.Draw(image)
        self.matrix, self.offset = matrix, offset
        self.unit = math.sqrt(abs(float(np.linalg.det(matrix))))  # pixels

    def fill(self, points: Points, color: Color) -> None:
        self.pen.polygon(self._pixels(points), fill=color)

    def stroke(self, points: Points, color: Color, width: float) -> None:
        pixels = max(1, round(width * self.unit))
        self.pen.line(self._pixels(points), fill=color, width=pixels, joint="curve")

    def _pixels(self, points: Points) -> list[float]:
        pixels: list[float] = (points @ self.matrix.T + self.offset).ravel().tolist()
        return pixels


def draw_features(canvas: Canvas, person: Person, units: Units, side: int) -> None:
    """One face, back to front; `side` (±1) is the one on which AU 14 acts."""
    _head(canvas, person)
    _nose(canvas, person, units)
    for x in (-1, 1):
        _eye(canvas, person, units, x)
        _brow(canvas, person, units, x)
    _frown(canvas, person, units)
    _mouth(canvas, person, units, side)
    if person.glasses:
        for x in (-1, 1):
            ring = _ellipse(x * person.eye_gap, -0.18, 0.24, 0.2)
            canvas.stroke(np.concatenate([ring, ring[:2]]), (40, 40, 45), 0.03)
        canvas.stroke(np.array([[-0.1, -0.2], [0.1, -0.2]]), (40, 40, 45), 0.03)


def _head(canvas: Canvas, person: Person) -> None:
    shade = mix(person.skin, (0, 0, 0), 0.25)
    if person.hair_style:
        drop = 0.55 if person.hair_style == 2 else 0.0
        canvas.fill(
            _ellipse(0, -0.15 + drop / 2, person.width + 0.14, 0.98 + drop / 2), person.hair
        )
    canvas.fill(np.array([[-0.3, 0.6], [0.3, 0.6], [0.36, 1.6], [-0.36, 1.6]]), shade)
    for side in (-1, 1):
        canvas.fill(_ellipse(side * person.width, -0.08, 0.1, 0.2), shade)
    angle = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    x, y = np.cos(angle) * person.width, np.sin(angle)
    x = np.where(y > 0, x * (1 - (1 - person.jaw) * y**2), x)
    outline = np.stack([x, np.where(y > 0, 0.98, 0.9) * y], axis=1)
    canvas.fill(outline, person.skin)
    if person.beard > 0:
        t = np.linspace(-1, 1, 13)
        cheeks = np.stack([0.97 * t * np.interp(0.2, y[:10], x[:10]), 0.36 - 0.16 * t**4], axis=1)
        beard = np.concatenate([cheeks, outline[y > 0.22]])
        canvas.fill(beard, mix(person.skin, person.hair, person.beard))
    if person.hair_style:
        low = -0.42 if person.hair_style == 3 else -0.62
        canvas.fill(np.concatenate([outline[y < -0.6] * 1.03, [[0.1, low]]]), person.hair)


def _eye(canvas: Canvas, person: Person, units: Units, side: int) -> None:
    """AU 5 raises the upper lid, AU 6 and 7 push up the lower one and narrow the eye."""
    w = person.eye_size
    tight = 0.6 * units["6"] + 0.55 * units["7"] + 0.3 * units["9"]
    upper = w * max(0.12, 0.55 + 0.4 * units["5"] - 0.28 * tight - 0.12 * units["4"])
    lower = w * max(0.06, 0.42 + 0.1 * units["5"] - 0.36 * tight)
    cx, cy = side * person.eye_gap, -0.18
    t = np.linspace(-1, 1, 11)
    arch = 1 - t**2
    # Raised inner brows pull the inner half of the lid up with them.
    lift = 0.25 * units["1"] * w * np.clip(-side * t, 0, 1) * arch
    top, bottom = cy - upper * arch - lift, cy + lower * arch
    x = cx + w * t
    canvas.fill(_band(x, top, bottom), (245, 243, 240))
    angle = np.linspace(0, 2 * math.pi, 20, endpoint=False)
    for radius, color in ((0.5 * w, person.iris), (0.22 * w, (10, 10, 10))):
        ix, iy = cx + radius * np.cos(angle), cy - 0.03 * w + radius * np.sin(angle)
        iy = np.clip(iy, np.interp(ix, x, top), np.interp(ix, x, bottom))
        canvas.fill(np.stack([ix, iy], axis=1), color)
    dark = mix(person.skin, (30, 15, 10), 0.75)
    canvas.stroke(np.stack([x, top], axis=1), dark, 0.028)
    canvas.stroke(np.stack([x, bottom], axis=1), mix(person.skin, (60, 30, 20), 0.4), 0.014)
    if units["6"] > 0.3:  # the cheek bulges, crow's feet at the outer corner
        fold = mix(person.skin, (60, 30, 20), 0.4 * min(1.0, units["6"]))
        bag = np.stack([x, cy + lower * arch + 0.07 + 0.03 * arch], axis=1)
        canvas.stroke(bag, fold, 0.02)
        for dy in (-0.04, 0.04):
            tail = [[cx + side * w * 1.15, cy + dy / 2], [cx + side * w * 1.5, cy + dy * 1.6]]
            canvas.stroke(np.array(tail), fold, 0.016)


def _brow(canvas: Canvas, person: Person, units: Units, side: int) -> None:
    """AU 1 raises the inner end, AU 2 the outer end, AU 4 lowers and draws them together."""
    base = -0.18 - person.brow_height - 0.03
    inner = base - 0.17 * units["1"] + 0.14 * units["4"] + 0.07 * units["9"] + 0.01
    outer = base - 0.16 * units["2"] - 0.02 * units["4"] + 0.05
    middle = base - 0.08 * (units["1"] + units["2"]) + 0.06 * units["4"] - 0.05
    start = person.eye_gap - 0.17 - 0.05 * units["4"]
    end = person.eye_gap + 0.21
    t = np.linspace(0, 1, 9)
    y = inner * (1 - t) ** 2 + 2 * middle * t * (1 - t) + outer * t**2
    x = side * (start + (end - start) * t)
    half = person.brow_width / 2 * (1.15 - 0.7 * t)
    canvas.fill(_band(x, y - half, y + half), mix(person.hair, (20, 15, 15), 0.3))


def _frown(canvas: Canvas, person: Person, units: Units) -> None:
    """Folds between the brows (AU 4), across the nose root (AU 9), over raised brows (AU 1, 2)."""

    def fold(strength: float) -> Color:
        return mix(person.skin, (50, 25, 15), 0.55 * min(1.0, strength))

    if units["4"] > 0.3:
        for x in (-0.05, 0.05):
            line = np.array([[x * 1.2, -0.42], [x, -0.3]])
            canvas.stroke(line, fold(units["4"]), 0.022)
    if units["9"] > 0.3:
        for y in (-0.2, -0.13):
            line = np.array([[-0.09, y - 0.03], [0, y], [0.09, y - 0.03]])
            canvas.stroke(line, fold(units["9"]), 0.02)
    raised = min(units["1"], units["2"])
    if raised > 0.3:
        t = np.linspace(-1, 1, 7)
        for y in (-0.68, -0.6):
            canvas.stroke(np.stack([0.36 * t, y + 0.03 * t**2], axis=1), fold(raised), 0.016)


def _nose(canvas: Canvas, person: Person, units: Units) -> None:
    """AU 9 and 10 raise and widen the wings; they and AU 12 deepen the folds beside the mouth."""
    shade = mix(person.skin, (60, 25, 15), 0.35)
    bottom = -0.12 + person.nose_length - 0.04 * units["9"]
    wide = person.nose_width * (1 + 0.25 * units["9"] + 0.12 * units["10"])
    canvas.stroke(np.array([[-0.04, -0.2], [-0.06, bottom - 0.1]]), shade, 0.014)
    t = np.linspace(-1, 1, 9)
    tip = bottom - 0.03 * t**2 + 0.02 * np.cos(3 * math.pi * t)
    canvas.stroke(np.stack([wide * t, tip], axis=1), shade, 0.024)
    for side in (-1, 1):
        wing = _ellipse(side * wide * 0.5, bottom + 0.005, 0.028, 0.016)
        canvas.fill(wing, mix(person.skin, (30, 10, 5), 0.6))
    depth = max(0.9 * units["12"], units["9"], units["10"])
    if depth > 0.25:
        fold = mix(person.skin, (60, 25, 15), 0.45 * min(1.0, depth))
        for side in (-1, 1):
            x = side * np.array([wide * 1.15, wide * 1.7 + 0.02, wide * 1.75 + 0.08 * units["12"]])
            y = bottom + np.array([-0.04 - 0.05 * units["10"], 0.08, 0.22])
            canvas.stroke(np.stack([x, y], axis=1), fold, 0.022)


def _mouth(canvas: Canvas, person: Person, units: Units, side: int) -> None:
    """Corners by AU 12, 14, 15; width by 12, 20, 23; opening by 25, 26; lips by 10, 17, 23."""
    w = person.mouth_width
    w *= 1 + 0.32 * units["12"] + 0.3 * units["20"] - 0.16 * units["23"] - 0.22 * units["26"]
    t = np.linspace(-1, 1, 17)
    corner = -0.13 * units["12"] + 0.13 * units["15"] + 0.04 * units["20"]
    one_sided = np.where(side * t > 0, -0.16 * units["14"], 0.02 * units["14"])
    bend = (corner + one_sided) * np.abs(t) ** 1.6
    x = w * t + side * 0.06 * units["14"] * (side * t > 0) * np.abs(t)
    y = 0.5 - 0.05 * units["17"] - 0.03 * units["9"] + bend
    arch = 1 - t**2
    gap = 0.3 * units["26"] + 0.13 * units["25"] + 0.03 * units["10"]
    gap = max(0.0, gap - 0.035)  # the resting tone keeps lips closed
    thin = max(0.25, 1 - 0.65 * units["23"] - 0.2 * units["12"])
    raised = 0.08 * units["10"] * np.exp(-4 * t**2)
    top = y - raised - 0.3 * gap * arch
    bottom = y - 0.02 * units["17"] * arch + 0.7 * gap * arch
    bow = 1 - 0.35 * np.exp(-30 * t**2)
    lip = person.lip * thin
    canvas.fill(_band(x, top - lip * bow * arch, bottom + 1.3 * lip * arch), person.lips)
    if gap > 0.02:
        canvas.fill(_band(x * 0.94, top, bottom), (50, 15, 20))
        teeth = min(0.055, gap * 0.5) * min(1.0, units["12"] + units["20"] + units["10"] + 0.3)
        canvas.fill(_band(x * 0.85, top, np.minimum(top + teeth * arch, bottom)), (240, 238, 230))
    else:
        canvas.stroke(
            np.stack([x, (top + bottom) / 2], axis=1), mix(person.lips, (40, 5, 10), 0.7), 0.024
        )
    shade = mix(person.skin, (60, 25, 15), 0.4)
    if units["17"] > 0.25:  # the chin boss wrinkles
        chin = np.stack([0.12 * t, 0.72 + 0.04 * t**2], axis=1)
        canvas.stroke(chin, shade, 0.02)
    if units["14"] > 0.3:  # a dimple beside the tightened corner
        edge = x[-1] if side > 0 else x[0]
        height = y[-1] if side > 0 else y[0]
        dimple = [
            [edge + side * 0.05, height - 0.07],
            [edge + side * 0.07, height],
            [edge + side * 0.04, height + 0.06],
        ]
        canvas.stroke(np.array(dimple), shade, 0.024)


def _band(x: Points, top: Points, bottom: Points) -> Points:
    """The outline between two curves over the same x."""
    upper, lower = np.stack([x, top], axis=1), np.stack([x, np.maximum(top, bottom)], axis=1)
    return np.concatenate([upper, lower[::-1]])


def _ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    angle = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def mix(a: Sequence[int], b: Sequence[int], share: float) -> Color:
    """`a` with `share` of `b`."""
    r, g, b_ = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return r, g, b_
