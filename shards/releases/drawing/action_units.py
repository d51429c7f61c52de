"""Expressions as facial action units (AU, Ekman & Friesen's facial action coding)."""

import numpy as np

from shards.releases.affectnet import CLASSES

# Their strength in each expression. "14" acts on one side of the mouth alone.
ACTIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "happy": {"6": 0.9, "12": 1.0, "25": 0.5},
    "sad": {"1": 1.0, "4": 0.45, "15": 1.0, "17": 0.6},
    "surprise": {"1": 1.0, "2": 1.0, "5": 0.8, "26": 1.0},
    "fear": {"1": 1.0, "2": 0.5, "4": 0.7, "5": 1.0, "20": 1.0, "25": 0.8},
    "disgust": {"4": 0.4, "7": 0.5, "9": 1.0, "10": 1.0, "15": 0.4},
    "anger": {"4": 1.0, "5": 0.3, "7": 0.7, "23": 1.0, "17": 0.4},
    "contempt": {"14": 1.0, "12": 0.1, "7": 0.2},
}
UNITS = tuple(sorted({au for units in ACTIONS.values() for au in units}, key=int))
INTENSITY = (0.6, 1.0)
JITTER = (0.75, 1.15)  # of each unit's strength
MISSING_P = 0.08  # a unit of the expression that does not show
RESTING = 0.12  # every unit's random tone, in all expressions


def sample_units(rng: np.random.Generator, label: int) -> dict[str, float]:
    """Every action unit's strength in one face of this expression, 0 … about 1.2."""
    intensity = rng.uniform(*INTENSITY)
    own, strengths = ACTIONS[CLASSES[label]], {}
    for au, tone, jitter, seen in zip(
        UNITS,
        rng.uniform(0, RESTING, len(UNITS)),
        rng.uniform(*JITTER, len(UNITS)),
        rng.random(len(UNITS)) >= MISSING_P,
        strict=True,
    ):
        shown = seen or len(own) <= 3  # an expression of one leading unit is nothing without it
        strengths[au] = float(tone + own.get(au, 0.0) * intensity * jitter * shown)
    return strengths
