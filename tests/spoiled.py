"""Checkpoints and bytes that nobody has written so: each spoils what it is given."""

import random
from collections.abc import Callable
from typing import Any

import torch

Change = Callable[[dict[str, Any]], object]


def aliased(depth: int, value: Any = 1) -> list[Any]:
    """2^depth times a value, in as many bytes as `depth` takes."""
    found = [value]
    for _ in range(depth):
        found = [found, found]
    return found


def put(*keys: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


def copy(value: Any) -> Any:
    return {key: copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


WEIGHT = ("objective", "network.classifier.weight")
SPOILED: dict[str, tuple[Change, str]] = {
    "NaN": (put("objective", "network.classifier.bias", value=torch.full((8,), torch.nan)),
            r"objective\.network\.classifier\.bias: 8 of 8 values are not finite"),
    "infinite": (put("objective", "centers", value=torch.full((8, 128), torch.inf)), "not finite"),
    "overflow": (put("objective", "network.backbone.bn1.running_var", value=-torch.ones(16)),
                 "output for a gray image is not finite"),
    "meta": (put(*WEIGHT, value=torch.empty(8, 128, device="meta")), "on device meta"),
    "sparse": (put(*WEIGHT, value=torch.eye(8, 128).to_sparse()), "sparse_coo"),
    "complex": (put(*WEIGHT, value=torch.ones(8, 128, dtype=torch.complex64)), "complex64"),
    "quantised": (put(*WEIGHT, value=torch.quantize_per_tensor(torch.ones(8, 128), 1, 0,
                                                               torch.quint8)), "quint8"),
    "no tensor": (put(*WEIGHT, value=[1.0]), "objective.*expected a tensor"),
    "pixels": (put("config", "model", "image_size", value=2**70), "whole number of 71 bits"),
    "many pixels": (put("config", "model", "image_size", value=2**16), r"image_size is 65536"),
    "heads": (put("config", "model", "heads", value=10**6), r"config\.model\.heads is 1000000"),
    "fusion": (put("config", "model", "fusion", value="max"), r"config\.model\.fusion is 'max'"),
    "precision": (put("config", "train", "precision", value="fp3"), r"precision is 'fp3'"),
    "tensor in it": (put("config", "data", "x", value=torch.ones(2)), r"data\.x is a tensor"),
    "graph": (put("config", "data", "x", value=aliased(30)), "more than 4,000,000 values"),
    "deep": (put("config", "data", "x", value=aliased(40)), "deeper than 32 levels|4,000,000"),
    "number": (put("config", "data", "x", value=10**500), "a whole number of"),
    "text": (put("config", "data", "x", value="x" * 20_000), "a text of 20,000 characters"),
    "escape": (put("class_names", value=[*"abcdefg", "\x1b[31m"]), r"class_names holds '\\x1b"),
    "step": (put("step", value="3"), "step is '3', expected a whole number"),
    "run": (put("run_id", value=["a"]), "run_id is a list"),
}  # fmt: skip


def moment(key: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        own = dict(content["optimizer"]["state"])
        own[3] = {**own[3], key: value}
        content["optimizer"] = {**content["optimizer"], "state": own}

    return change


STATES: dict[str, tuple[Change, str]] = {
    "shape": (moment("exp_avg", torch.ones(3)), r"state\.3\.exp_avg is of shape"),
    "NaN": (moment("exp_avg_sq", torch.full((16,), torch.nan)), "3.exp_avg_sq holds what"),
    "foreign": (moment("momentum_buffer", torch.ones(3)), r"state\.3 is not of adam"),
    "no state": (put("optimizer", value={}), "expected its state and its param_groups"),
    "groups": (put("optimizer", "param_groups", value=[{"params": [0]}]), "param_groups are not"),
    "missing": (lambda c: c["objective"].pop("centers"), r"objective\.centers is missing"),
    "more": (put("objective", "network.x", value=torch.ones(1)), r"network\.x is none of"),
    "marks": (put("figures", value=[["a"]]), r"figures\.0\.0 is 'a'"),
    "judged": (put("right", value=[1]), r"right is a list"),
    "replaced": (put("replaced", value=-1), r"replaced is -1, expected a whole number"),
    "best": (put("best", value={"accuracy": "high"}), r"best\.accuracy is 'high'"),
    "sets": (put("sets", value=3), r"sets is 3, expected a list"),
    "former": (put("config", "loss", "afn", value="partition_batch"),
               r"cannot be resumed from: loss\.afn: partition_batch has gone.*partition_release"),
}  # fmt: skip


# What a JSON file of ours may hold after something else has written into it
FOREIGN = {"nothing": b"", "null": b"null", "list": b"[1]", "text": b'"x"', "number": b"7e999",
           "deep": b"[" * 200_000, "digits": b"[" + b"1" * 5000 + b"]", "bytes": b"\xff\xfe{",
           "zeros": bytes(64), "keys": b'{"a": 1}'}  # fmt: skip


def damage(dice: random.Random, data: bytes) -> tuple[bytes, str]:
    """The bytes with a fault as disks, networks and people make them, and a word on it.

    One in two strikes the first hundred bytes, where formats have their headers.
    """
    kind = dice.choice(("bits", "cut", "zeros", "noise", "again", "gone", "more", "ones", "empty"))
    end = min(len(data), 100) if dice.random() < 0.5 else len(data)
    at = dice.randrange(end) if end else 0
    size = min(dice.choice((1, 4, 64, 4096)), len(data) - at)
    found = bytearray(data)
    if kind == "bits":
        for _ in range(dice.choice((1, 1, 8))):
            place = dice.randrange(end) if end else 0
            if found:
                found[place] ^= 1 << dice.randrange(8)
    elif kind in ("cut", "empty"):
        del found[at if kind == "cut" else 0 :]
    elif kind == "gone":
        del found[at : at + size]
    else:
        piece = {"zeros": bytes(size), "ones": b"\xff" * size, "again": data[at : at + size]}
        new = piece.get(kind, dice.randbytes(size))
        found[at : at if kind in ("again", "more") else at + size] = new
    return bytes(found), f"{kind} at {at} of {len(data)}, {size} bytes"


def odd_value(dice: random.Random) -> Any:
    """A value that hardly anything expects."""
    tensors = [torch.tensor(torch.nan), torch.full((3, 3), 1e38), torch.empty(2, device="meta"),
               torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64),
               torch.zeros(0), torch.ones(1, dtype=torch.float8_e5m2),
               torch.ones(1).expand(10**6)]  # fmt: skip
    plain = [None, True, -1, 0, 3, 2**62, 2**70, 10**400, 0.5, -1e308, float("nan"), float("inf"),
             "", "x", "x" * 20_000, "\x1b[31m", "a\nb", "../..", "\udc80", b"", b"\xff", [], [1],
             {}, {"a": 1}, {1: 2}, (), aliased(30), {"a" * 300: {}}]  # fmt: skip
    return dice.choice(tensors if dice.random() < 0.3 else plain)


def spoil(dice: random.Random, content: dict[str, Any]) -> str:
    """Changes something in nested dicts and lists, somewhere; returns a word on it."""
    inner: Any = content
    place: list[str] = []
    while True:
        key = dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        place.append(str(key))
        below = inner[key]
        if not isinstance(below, dict | list) or not below or dice.random() < 0.2:
            break
        inner = below
    name = ".".join(place)
    if dice.random() < 0.15:
        del inner[key]
        return f"{name} removed"
    if isinstance(below, torch.Tensor) and below.numel() and dice.random() < 0.6:
        inner[key] = other = _other(dice, below)
        return f"{name}: {other.dtype} {tuple(other.shape)}, {other.flatten()[:1].tolist()}"
    inner[key] = value = odd_value(dice)
    return f"{name} = {str(value)[:60]!r}" if not _is_large(value) else f"{name} = a graph"


def _is_large(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _other(dice: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in place of another: one value, the sign, the size, the shape or the type."""
    found = tensor.clone()
    kind = dice.randrange(6)
    if kind == 0:
        values = (
            (torch.nan, torch.inf, 1e38, -1.0) if found.is_floating_point() else (-1, 2**31 - 1)
        )
        found.view(-1)[dice.randrange(found.numel())] = dice.choice(values)
    elif kind == 1:
        found = found * dice.choice((1e30, -1, 0))
    elif kind == 2:
        found = found.flatten()[: dice.randrange(found.numel())]
    elif kind == 3:
        found = found.reshape(1, *found.shape)
    elif kind == 4:
        found = found.to(dice.choice((torch.float16, torch.int64, torch.bool, torch.complex64)))
    else:
        found = found.transpose(0, -1) if found.ndim else found.expand(2)
    return found


def damaged_scans(jpeg: bytes) -> dict[str, bytes]:
    """A JPEG with its image data spoilt in ways that most decoders pass over in silence."""
    half = jpeg[: len(jpeg) // 2]
    noise = random.Random(0).randbytes(len(half)).replace(b"\xff", b"\xfe")
    table = jpeg.index(b"\xff\xdb")
    end = table + 2 + int.from_bytes(jpeg[table + 2 : table + 4], "big")
    return {
        "cut": half + b"\xff\xd9",
        "zeros": half + bytes(len(half)) + b"\xff\xd9",
        "noise": half + noise + b"\xff\xd9",
        "no scan": jpeg[: jpeg.index(b"\xff\xda") + 14] + b"\xff\xd9",
        "no table": jpeg[:table] + jpeg[end:],
    }
