"""Whether a training's step is compiled and captured as a CUDA graph, and where compiled code lies.

On an H100, DAN's step of 256 images takes 28 ms as it stands and 23 compiled; one of 32 takes 20,
of which the GPU works for 7. Compiling takes some 50 s, capturing a few steps.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

CompileChoice = bool | Literal["auto"]

BACKEND = "inductor"
WORTH_STEPS = 10_000  # that save 5 ms each and so pay for 50 s


class Compilation(NamedTuple):
    """How a step is run."""

    compile: bool
    capture: bool  # the whole step as one CUDA graph
    reason: str


def choose_compilation(
    choice: CompileChoice, device: torch.device, *, steps: int, may_capture: bool
) -> Compilation:
    """What `train.compile` means on a device for so many steps.

    may_capture: nothing in the step waits for the device, and its engine takes part.
    """
    capture = may_capture and device.type == "cuda" and choice is not False
    if choice != "auto":
        return Compilation(choice, capture, f"train.compile is {str(choice).lower()}")
    if device.type != "cuda":
        return Compilation(False, False, f"train.compile is auto: not on a {device.type}")
    worth = steps >= WORTH_STEPS
    few = "" if worth else f", fewer than the {WORTH_STEPS} that pay for compiling"
    return Compilation(worth, capture, f"train.compile is auto, {steps} steps{few}")


def describe(chosen: Compilation) -> str:
    """The line that a run logs."""
    words = ["compiled" if chosen.compile else "not compiled"]
    words += ["one CUDA graph"] if chosen.capture else []
    return f"step: {', '.join(words)} ({chosen.reason})"


def compile_module(module: nn.Module) -> None:
    """Compiles a module at its first call, for the shapes that it is called with."""
    keep_compiled_code()
    module.compile(backend=BACKEND, dynamic=False)


def forget_compiled(module: nn.Module) -> None:
    """Undoes `compile_module`."""
    module._compiled_call_impl = None


def keep_compiled_code() -> None:
    """Lets runs share compiled code, in the user's cache unless TORCHINDUCTOR_CACHE_DIR is set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "dan_dist" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # torch's own choice, in the machine's temporary folder
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
