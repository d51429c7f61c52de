"""The number format that a network computes in; weights, statistics and losses keep their own."""

from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bf16", "fp16", "float64"]  # on a CPU, tf32 is float32
PrecisionChoice = Precision | Literal["auto"]

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(
    choice: PrecisionChoice, device: torch.device, engine: str = "ddp"
) -> Precision:
    """The format of `choice`; of "auto" the fastest that the device computes in by itself.

    GPUs before Ampere only emulate bfloat16: float16 there, whose losses are scaled, and float32
    where the training's engine is deepspeed, which scales none here. On a CPU bfloat16 where it
    multiplies it, else float32.
    """
    if choice != "auto":
        return choice
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "float32" if engine == "deepspeed" else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def weight_dtype(precision: Precision) -> torch.dtype:
    """What weights are kept in."""
    return torch.float64 if precision == "float64" else torch.float32


def autocast(precision: Precision, device: torch.device, *, cache: bool = True) -> torch.autocast:
    """Within it, what gains by it is computed in 16 bits, where `precision` has 16.

    cache: of weights in 16 bits; a CUDA graph that is captured takes none.
    """
    half = HALF.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None, cache_enabled=cache)
