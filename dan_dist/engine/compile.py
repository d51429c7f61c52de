"""Whether a training's step is compiled and captured as a CUDA graph, and where compiled code lies.

On an H100, DAN's step of 256 images takes 28 ms as it stands and 23 compiled; one of 32 takes 20,
of which the GPU works for 7. Compiling takes some 50 s, capturing a few steps.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch._functorch.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException

CompileChoice = bool | Literal["auto"]

BACKEND = "inductor"
WORTH_STEPS = 10_000  # that save 5 ms each and so pay for 50 s


class Compilation(NamedTuple):
    """How a step is run."""

    compile: bool
    capture: bool  # the whole step as one CUDA graph
    reason: str


def choose_compilation(
    choice: CompileChoice, device: torch.device, *, steps: int, prevented: str = ""
) -> Compilation:
    """What `train.compile` means on a device for so many steps.

    prevented: why a step cannot be captured even on a GPU, if so.
    """
    capture = not prevented and device.type == "cuda" and choice is not False
    why_not = f"; no CUDA graph: {prevented}" if prevented and choice is not False else ""
    if device.type != "cuda" and choice == "auto":
        return Compilation(False, False, f"train.compile is auto: not on a {device.type}")
    if device.type != "cuda" or choice != "auto":
        return Compilation(
            choice is True, capture, f"train.compile is {str(choice).lower()}{why_not}"
        )
    worth = steps >= WORTH_STEPS
    few = "" if worth else f", fewer than the {WORTH_STEPS} that pay for compiling"
    return Compilation(worth, capture, f"train.compile is auto, {steps} steps{few}{why_not}")


def describe(chosen: Compilation) -> str:
    """The line that a run logs."""
    words = ["compiled" if chosen.compile else "not compiled"]
    words += ["one CUDA graph"] if chosen.capture else []
    return f"step: {', '.join(words)} ({chosen.reason})"


class CompiledModule:
    """A module that is compiled, for the shapes that it is called with, at `rehearse` or a call.

    As one graph, under DDP too, which would have it cut at each of its buckets of 25 MB, so that
    their exchange hides behind what is left of the backward pass. Uncut, the gradients of DAN, 79
    MB, are exchanged after it: less than 1 ms inside a node and 3 ms over 50 GB/s between nodes, by
    arithmetic. In return all of the step is fused, and is one sequence for a CUDA graph.
    """

    def __init__(self, module: nn.Module) -> None:
        keep_compiled_code()
        torch._dynamo.config.optimize_ddp = False
        # Else the first `backward` would compile its part, where nothing catches what fails
        torch._functorch.config.force_non_lazy_backward_lowering = True
        self._module, self._is_rehearsal = module, False
        module.compile(backend=self._compile, dynamic=False)

    def rehearse(self, *inputs: object) -> None:
        """Compiles forward and backward of a call, and runs neither: no collective is begun.

        Raises:
            ValueError: it cannot be compiled here.
        """
        self._is_rehearsal = True
        try:
            self._module(*inputs)
        except _CompiledNotRun:
            pass
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = str(cause).strip().split("\n")[0]
            raise ValueError(f"{type(cause).__name__}: {reason}") from error
        finally:
            self._is_rehearsal = False

    def forget(self) -> None:
        """The module is no longer compiled."""
        self._module._compiled_call_impl = None

    def _compile(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        compiled = torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

        def run(*inputs: Any) -> Any:
            if self._is_rehearsal:
                raise _CompiledNotRun
            return compiled(*inputs)

        return run


class _CompiledNotRun(Exception):  # noqa: N818 (no error)
    """A call was compiled, and ends here."""


def keep_compiled_code() -> None:
    """Lets runs share compiled code, in the user's cache unless TORCHINDUCTOR_CACHE_DIR is set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "dan_dist" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # torch's own choice, in the machine's temporary folder
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
