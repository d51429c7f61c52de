"""A training step as one CUDA graph: recorded once, then replayed without a launch of its own.

Everything that the step reads and writes stays where it is in memory. What recording changes,
weights, statistics, the optimiser's state, random numbers, is put back before the first real step.
It must be recorded before the loader opens: DALI's freed buffers synchronise the device, which ends
a capture under way.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

WARM_STEPS = 11  # DDP's buckets and the allocator's blocks have then found their places


class Figures(NamedTuple):
    """What a step gives, on the device."""

    sums: Tensor  # (8 + 2 · ranks,) over ranks: the loss in parts, accuracy, flags, ranks' times
    grad_norm: Tensor  # ()
    skipped: bool = False


Step = Callable[[Tensor, Tensor, Tensor], Figures]  # images, labels, flags


class Recorder(Protocol):
    """The device's part of recording."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` on a stream of its own, to its end."""

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """Records what `work` launches; returns what replays it."""


class CudaRecorder:
    """By CUDA graphs."""

    def warm_up(self, work: Callable[[], object]) -> None:
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # nccl's watchdog asks for events from a thread of its own meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay


class StepGraph:
    """A recorded step. images, labels, flags: of the step's shapes, where it reads them."""

    def __init__(
        self,
        step: Step,
        images: Tensor,
        labels: Tensor,
        flags: Tensor,
        recorder: Recorder | None = None,  # else by CUDA graphs
    ) -> None:
        """
        Raises:
            ValueError: the device does not record it.
        """
        self._inputs, recorder = (images, labels, flags), recorder or CudaRecorder()
        recorder.warm_up(lambda: [step(*self._inputs) for _ in range(WARM_STEPS)])
        try:
            self._replay = recorder.record(self._run(step))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(str(error).split("\n")[0]) from error

    def __call__(self, images: Tensor, labels: Tensor, flags: Tensor) -> Figures:
        """The step on other inputs of the same shapes."""
        for own, given in zip(self._inputs, (images, labels, flags), strict=True):
            own.copy_(given, non_blocking=True)
        self._replay()
        return Figures(self._found.sums.clone(), self._found.grad_norm.clone())

    def _run(self, step: Step) -> Callable[[], None]:
        def run() -> None:
            self._found = step(*self._inputs)

        return run
