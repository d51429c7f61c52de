"""Files of the authors' DAN: their names for our tensors, their networks."""

import re
from pathlib import Path
from typing import Any

import torch

from dan_dist.model.classes import ORDERS, class_order
from dan_dist.model.dan import DAN
from dan_dist.model.state_dict import fill_network, is_count, named_tensors

AUTHORS_SIZE = 224  # pixels

# Our names for the parts of DAN → the authors'
_STAGES = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
_SPATIAL = {"reduce": "conv1x1", "square": "conv_3x3", "wide": "conv_1x3", "tall": "conv_3x1"}


def authors_name(key: str) -> str:
    """The name that a tensor of ours has in the authors' release."""
    part, _, rest = key.partition(".")
    if part == "backbone":
        stage, _, rest = rest.partition(".")
        return f"features.{_STAGES[stage]}.{rest}"
    if part == "heads":
        number, kind, module, rest = rest.split(".", 3)
        inner = f"sa.{_SPATIAL[module]}" if kind == "spatial" else "ca.attention"
        return f"cat_head{number}.{inner}.{rest}"
    return {"classifier": "fc", "logit_norm": "bn"}[part] + f".{rest}"


def read_authors(
    path: Path, content: dict[str, Any], classes: str | None
) -> tuple[DAN, tuple[str, ...], int]:
    """Network, class names and epochs of a file of theirs, `{'iter', 'model_state_dict', …}`.

    The tensors may stand there bare, too. classes: as `class_order`; the format does not name them.
    """
    tensors = named_tensors(content)
    count = len(tensors["fc.bias"]) if tensors.get("fc.bias", torch.empty(())).ndim else 1
    heads = {found[0] for key in tensors if (found := re.match(r"cat_head\d+\.", key))}
    network = fill_network(count, len(heads) or 4, tensors, authors_name, path)
    order = classes or ("affectnet8" if count == 8 else None)
    if order is None:
        raise ValueError(
            f"{path} is of the authors' format, which does not name its {count} classes: name "
            f"their order by --classes (in a training, model.weights_classes): one of "
            f"{', '.join(ORDERS)}, or the names with commas"
        )
    names = class_order(order)
    if len(names) != count:
        raise ValueError(f"{path} has {count} classes, '{order}' has {len(names)}")
    epochs: Any = content.get("iter")
    return network, names, epochs if is_count(epochs) and epochs < 2**31 else 0
