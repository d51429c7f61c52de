"""Drawn faces whose expressions come from facial action units.

Person, pose, light, background and noise vary freely; the expression is a set of action units that
move brows, lids, nose, cheeks and mouth. Every number of a face comes from one Philox stream.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from shards.releases.drawing.action_units import sample_units
from shards.releases.drawing.features import Canvas, Person, draw_features, mix

SKINS = (
    (255, 224, 196),
    (241, 194, 160),
    (224, 172, 128),
    (198, 134, 92),
    (141, 92, 60),
    (96, 62, 44),
)
HAIRS = ((30, 24, 22), (70, 46, 30), (120, 80, 45), (190, 150, 90), (150, 60, 30), (150, 150, 150))
IRISES = ((60, 40, 25), (90, 60, 30), (70, 110, 150), (80, 120, 80), (40, 30, 25))


def draw_face(
    seed: int, index: int, label: int, *, size: int, person: int | None = None
) -> Image.Image:
    """The RGB image, size×size pixels, of face `index` with expression `label`.

    person: a number; None makes everybody a stranger.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    own = np.random.Generator(np.random.Philox(key=[seed, (1 << 62) + (person or 0)]))
    features = _sample_person(rng if person is None else own)
    units = sample_units(rng, label)
    large = size * (3 if size < 128 else 2)
    image = _background(rng, large)
    draw_features(_sample_pose(rng, image), features, units, 1 if rng.random() < 0.5 else -1)
    image = image.resize((size, size), Image.Resampling.BOX)
    return _photograph(rng, image)


def _sample_person(rng: np.random.Generator) -> Person:
    u: list[float] = rng.random(18).tolist()

    def between(k: int, low: float, high: float) -> float:
        return low + u[k] * (high - low)

    skin = mix(SKINS[int(u[0] * 6)], SKINS[int(u[1] * 6)], 0.3)
    return Person(
        width=between(2, 0.66, 0.8),
        jaw=between(3, 0.55, 0.85),
        skin=skin,
        hair=HAIRS[int(u[4] * 6)],
        iris=IRISES[int(u[5] * 5)],
        lips=mix(skin, (190, 60, 70), between(6, 0.35, 0.7)),
        hair_style=int(u[7] * 4),
        eye_gap=between(8, 0.3, 0.36),
        eye_size=between(9, 0.14, 0.18),
        brow_width=between(10, 0.045, 0.085),
        brow_height=between(11, 0.2, 0.26),
        nose_length=between(12, 0.28, 0.38),
        nose_width=between(13, 0.1, 0.16),
        mouth_width=between(14, 0.24, 0.32),
        lip=between(15, 0.04, 0.07),
        beard=between(16, -0.9, 0.4),
        glasses=bool(u[17] < 0.1),
    )


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """A gradient between two colours, at times with a shape in it."""
    colors = rng.integers(20, 236, (2, 3))
    ramp = np.linspace(0, 1, 16)
    share = np.add.outer(ramp * rng.random(), ramp * rng.random())[:, :, None] / 2
    grid = (colors[0] * (1 - share) + colors[1] * share).astype(np.uint8)
    image = Image.fromarray(grid).resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        x, y, w, h = rng.random(4) * size
        tint = tuple(int(v) for v in rng.integers(0, 256, 3))
        ImageDraw.Draw(image).rectangle((x, y, x + w, y + h), fill=tint)
    return image


def _sample_pose(rng: np.random.Generator, image: Image.Image) -> Canvas:
    """In-plane roll, a turn of the head as shear and narrowing, and the slack of a face crop."""
    roll = rng.normal(0, math.radians(5))
    scale = image.width * rng.uniform(0.5, 0.58)
    narrow, shear = rng.uniform(0.92, 1.04), rng.normal(0, 0.04)
    rotation = np.array([[math.cos(roll), -math.sin(roll)], [math.sin(roll), math.cos(roll)]])
    matrix = scale * rotation @ np.array([[narrow, shear], [0, 1]])
    offset = image.width * (0.5 + rng.uniform(-0.035, 0.035, 2))
    return Canvas(image, matrix, offset)


def _photograph(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Light from one direction, contrast, colour cast, blur and sensor noise."""
    size = image.width
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7) * size / 64))
    pixels = np.asarray(image, np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    direction = rng.normal(0, 0.15, 2)
    light = 1 + np.add.outer(direction[0] * ramp, direction[1] * ramp)[:, :, None]
    cast = rng.normal(1, 0.05, 3)
    contrast, brightness = rng.uniform(0.75, 1.1), rng.uniform(-18, 18)
    pixels = (pixels - 128) * light * cast * contrast + 128 + brightness
    noise = rng.standard_normal((size, size, 1), np.float32) * rng.uniform(0, 6)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
