"""State dicts from files that may come from anywhere, and networks filled from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dan_dist.model.classes import join_names
from dan_dist.model.dan import DAN

PREFIXES = ("module.", "_orig_mod.", "backbone.")  # of wrappers


def named_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The named tensors, bare or under the field's usual keys, without wrappers' prefixes."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(name), dict):
            content = content[name]
    return {_strip(str(k)): v for k, v in content.items() if isinstance(v, Tensor)}


def _strip(key: str) -> str:
    while (prefix := next((p for p in PREFIXES if key.startswith(p)), None)) is not None:
        key = key.removeprefix(prefix)
    return key


def fill_network(
    classes: int, heads: int, tensors: dict[str, Tensor], name_of: Callable[[str], str], path: Path,
    *, cosine: bool = False,
) -> DAN:  # fmt: skip
    """A network that has all of its tensors from a file.

    name_of: a tensor's name in the file, from its own. Tensors that are missing, of another shape
    or kind, or too many, are a ValueError that lists them.
    """
    with torch.device("meta"):  # no memory: the file's tensors become the network's
        network = DAN(classes, heads, cosine=cosine)
    own = network.state_dict()
    names = {k: name_of(k) for k in own}
    found = {k: tensors[n] for k, n in names.items() if n in tensors}
    counters = [k for k in own if k.endswith("num_batches_tracked")]  # not in all files
    wanted = [k for k in own if k in found or k not in counters]
    missing = [names[k] for k in wanted if k not in found or not _fits(found[k], own[k])]
    extra = sorted(tensors.keys() - names.values())
    if missing or extra:
        raise ValueError(
            f"{path}: neither a checkpoint of this project nor the authors' DAN: "
            f"{len(wanted) - len(missing)} of {len(wanted)} tensors match; missing or of another "
            f"shape: {join_names(missing, 5)}; unknown: {join_names(extra, 5)}"
        )
    double = any(tensor.dtype == torch.float64 for tensor in found.values())
    dtype = torch.float64 if double else torch.float32
    state = {k: torch.tensor(0) for k in counters}
    state |= {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def _fits(tensor: Any, wanted: Tensor) -> bool:
    """Whether it can replace a tensor of the network, and its storage holds its whole shape."""
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == wanted.shape
        and tensor.is_floating_point() == wanted.is_floating_point()
        and not tensor.is_complex()
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number from 0 on."""
    return type(value) is int and value >= 0
