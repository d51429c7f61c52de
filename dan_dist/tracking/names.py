"""Names and values as MLflow takes them: the one place that knows which those are.

What a user has written is checked, and refused before training. What comes from the data, such as
the names of classes in metrics, is made fit; its original stands in a tag of the run.
"""

import hashlib
import posixpath
import re
from collections.abc import Mapping

ORIGINAL = "dan_dist.name."  # tag of a name that was made fit: what it was before
MOST_LETTERS = 250  # of a name in MLflow's tables
PARAM_LETTERS, TAG_LETTERS = 6000, 5000  # of a value, as servers of MLflow 2 take them too
ROOM = MOST_LETTERS - len(ORIGINAL)  # for a name that was made fit

_UNFIT = re.compile(r"[^/\w.\- :]")


def is_fit(name: str) -> bool:
    """Whether MLflow takes `name` for a metric, a parameter or a tag."""
    if not name or len(name) > MOST_LETTERS or _UNFIT.search(name) or name != name.strip():
        return False
    return posixpath.normpath(name) == name and not name.startswith(("/", ".."))


def fit(name: str) -> str:
    """`name` where MLflow takes it, else one close to it.

    No two names become the same one: each part between slashes that is not fit gets some digits of
    its own. So a class is called the same in all its metrics.
    """
    if is_fit(name):
        return name
    made = "/".join(map(_fit_part, name.split("/")))
    return made if is_fit(made) and len(made) <= ROOM else _with_digits(made, name)


def _fit_part(part: str) -> str:
    is_whole = part == part.strip() and not part.startswith(".") and not _UNFIT.search(part)
    return part if part and is_whole else _with_digits(part, part)


def _with_digits(text: str, name: str) -> str:
    """`text` with what is not fit replaced, and digits that stand for `name`."""
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    text = _UNFIT.sub("_", text)[: ROOM - len(digits) - 1].strip("-./ ")
    return f"{text}-{digits}" if text else digits


def fit_value(text: str, most: int) -> str:
    """`text` as databases take it: without NUL, as UTF-8, at most so many characters."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()[:most]


def originals(names: Mapping[str, str]) -> dict[str, str]:
    """The tags that keep what was changed of {original: fit}."""
    return {ORIGINAL + new: old for old, new in names.items() if new != old}


def check_written(experiment: str, tags: Mapping[str, str], run_name: str | None = None) -> None:
    """Refuses an experiment's name, tags or a run's name that no MLflow server takes whole.

    Raises:
        ValueError: names the key of the configuration.
    """
    for key in tags:
        if not is_fit(key):
            raise ValueError(
                f"tracking.tags: {key!r} is no name for MLflow, which takes 1 to {MOST_LETTERS} "
                "letters, digits and _ - . : / and spaces in between"
            )
    for key, text, least, most in (
        ("experiment", experiment, 1, 2 * MOST_LETTERS),
        ("run_name", run_name or "", 0, MOST_LETTERS),
        *((f"tags.{key}", text, 0, TAG_LETTERS) for key, text in tags.items()),
    ):
        if len(text.strip()) < least or fit_value(text, most) != text:
            shown = repr(text) if len(text) <= 100 else f"{text[:100]!r}…"
            raise ValueError(f"tracking.{key} is {shown}: MLflow takes {least} to {most} letters "
                             "of UTF-8, without NUL")  # fmt: skip
