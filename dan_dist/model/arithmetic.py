"""How a GPU computes where torch leaves a choice: what float32 is, and whether runs repeat."""

import os
from typing import Any

import torch


def choose_arithmetic(precision: str, *, deterministic: bool = False) -> None:
    """Sets, for this process, what float32 means on a GPU, and which algorithms are taken.

    By itself torch computes convolutions, but not matrix products, in TF32, which has ten bits of
    mantissa. Here both are float32, or under the precision "tf32" both TF32. With `deterministic`
    an operation without an algorithm that repeats to the bit is an error, which names it.
    """
    allowed = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed
    if deterministic:  # before cuBLAS starts, which reads it then
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Nothing reads memory before it is written; filling it would cost as much as writing it
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
