"""A trace of a few steps by torch's profiler, from one rank of every node, for Perfetto."""

import logging
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from torch.profiler import ProfilerActivity, profile, schedule

from dan_dist.distributed.world import World

log = logging.getLogger(__name__)

FOLDER = "profile"  # of the traces, in the run's
WAIT, WARM = 2, 1  # steps before: the first ones compile and fill caches


class StepProfiler:
    """Traces `steps` steps of this node where that is asked for, once a start."""

    def __init__(self, folder: Path, world: World, steps: int | None) -> None:
        self.folder, self._steps_left = folder / FOLDER, 0
        self._profiler: Any = None
        if steps is None or world.local_rank:
            return
        node = re.sub(r"[^\w.-]", "_", f"{socket.gethostname()}-rank{world.rank}")
        self._path = self.folder / f"{node}.json.gz"
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._steps_left = WAIT + WARM + steps
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM, active=steps, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> Self:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            log.warning("train.profile: the run ended before its steps were traced")
            self._profiler.stop()
            self._profiler = None

    def step(self) -> bool:
        """A step has ended; whether it was, or may have been, slowed by tracing."""
        if self._profiler is None:
            return False
        self._profiler.step()
        self._steps_left -= 1
        if not self._steps_left:
            self._profiler.stop()
            self._profiler = None
        return True

    def _write(self, found: Any) -> None:
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            found.export_chrome_trace(str(self._path))
            log.info("train.profile: %s, to be opened in https://ui.perfetto.dev", self._path)
