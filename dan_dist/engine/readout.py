"""A step's numbers on their way from the device to the host."""

from typing import Any

import torch
from torch import Tensor


class Readout:
    """Numbers that are copied as soon as the device has made them, and waited for when read.

    A plain read would stand in the device's queue behind whatever was put there since: behind the
    whole next step, after which the device would idle until Python has prepared another.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values
        self._event: Any = None
        if values.is_cuda:
            cuda: Any = torch.cuda  # whose events have no types
            event = cuda.Event()
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            event.record()
            self._event = event

    def read(self) -> list[float]:
        """The numbers; waits for the operations up to where this was made, for no later ones."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers
