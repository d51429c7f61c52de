"""Files of DAN that are no checkpoints of ours: the authors', forks', bare state dicts."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dan_dist.model.classes import ORDERS, class_order, join_names
from dan_dist.model.dan import DAN
from dan_dist.model.state_dict import Match, Place, empty_network, fill_network, find_places, match
from dan_dist.run.plain import is_count
from dan_dist.schema import MOST_HEADS

log = logging.getLogger(__name__)

AUTHORS_SIZE = 224  # pixels

# Our names for the parts of DAN → the authors'
STAGES = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
_SPATIAL = {"reduce": "conv1x1", "square": "conv_3x3", "wide": "conv_1x3", "tall": "conv_3x1"}


def authors_name(key: str) -> str:
    """The name that a tensor of ours has in the authors' release."""
    part, _, rest = key.partition(".")
    if part == "backbone":
        stage, _, rest = rest.partition(".")
        return f"features.{STAGES[stage]}.{rest}"
    if part == "heads":
        number, kind, module, rest = rest.split(".", 3)
        inner = f"sa.{_SPATIAL[module]}" if kind == "spatial" else "ca.attention"
        return f"cat_head{number}.{inner}.{rest}"
    return {"classifier": "fc", "logit_norm": "bn"}[part] + f".{rest}"


class Layout(NamedTuple):
    """How files name the tensors of a DAN."""

    name_of: Callable[[str], str]  # from our name
    head: str  # a pattern of what the names of a head's tensors begin with
    modules: tuple[str, ...]  # what all names begin with, but the authors' heads'
    heads: int  # of a file that has none


THEIRS = Layout(authors_name, r"cat_head\d+", ("features", "fc", "bn"), 4)
OURS = Layout(str, r"heads\.\d+", ("backbone", "heads", "classifier", "logit_norm"), 0)


def read_authors(
    path: Path, content: Mapping[str, Any], classes: str | None
) -> tuple[DAN, tuple[str, ...], int]:
    """Network, class names and epochs of a file in the authors' names, or in ours.

    The tensors may stand at any place of the file, under any prefix. classes: as `class_order`; the
    format does not name them.

    Raises:
        ValueError: names the tensors that are missing and those that are left over.
    """
    trunk = [f"backbone.{key}" for key in empty_network(1, 0).backbone.state_dict()]
    trials = [
        (layout, _match(layout, place))
        for layout in (THEIRS, OURS)
        for place in find_places(content, {layout.name_of(key) for key in trunk})
    ] or [(THEIRS, _match(THEIRS, Place("", "", {})))]
    whole = [trial for trial in trials if trial[1].is_whole]
    if not whole:
        _, nearest = max(trials, key=lambda trial: len(trial[1].found))
        raise ValueError(
            f"{path}: neither a checkpoint of this project nor the authors' DAN: "
            f"{nearest.describe()}"
        )
    layout, found = whole[0]
    others = [other.place.name.strip() or "(at its top)" for _, other in whole[1:]]
    if found.left or others:
        log.info("%s: the network%s; left over: %s; other whole networks: %s", path,
                 found.place.name, join_names(found.left, 5), join_names(others, 5))  # fmt: skip
    count = len(found.found["classifier.weight"])
    heads = len({key.split(".")[1] for key in found.found if key.startswith("heads.")})
    names = _class_names(path, count, classes, is_theirs=layout is THEIRS)
    epochs: Any = content.get("iter", content.get("epoch"))
    is_known = is_count(epochs) and epochs < 2**31
    return fill_network(count, heads, found.found, path), names, epochs if is_known else 0


def _match(layout: Layout, place: Place) -> Match:
    """How a place fits the DAN of as many classes and heads as it has."""
    bias = place.tensors.get(place.prefix + layout.name_of("classifier.bias"))
    pattern = re.compile(re.escape(place.prefix) + rf"({layout.head})\.")
    heads = {found[1] for key in place.tensors if (found := pattern.match(key))}
    network = empty_network(
        len(bias) if bias is not None and bias.ndim else 1,
        min(len(heads), MOST_HEADS) or layout.heads,
    )
    return match(place, network.state_dict(), layout.name_of, layout.modules)


def _class_names(
    path: Path, count: int, classes: str | None, *, is_theirs: bool
) -> tuple[str, ...]:
    """The classes, which a file of tensors does not name; the authors' eight are AffectNet's."""
    order = classes or ("affectnet8" if count == 8 and is_theirs else None)
    if order is None:
        whose = "of the authors' format" if is_theirs else "a network's tensors alone"
        raise ValueError(
            f"{path} is {whose}, which does not name its {count} classes: name "
            f"their order by --classes (in a training, model.weights_classes): one of "
            f"{', '.join(ORDERS)}, or the names with commas"
        )
    names = class_order(order)
    if len(names) != count:
        raise ValueError(f"{path} has {count} classes, '{order}' has {len(names)}")
    return names
