"""The load of every node, in the run of rank 0: CPU, memory, disk, network and GPUs.

One rank of each node samples, in a thread. The samples of the other nodes come by the store that
all ranks share, which nothing waits for; rank 0 hands them to its journal without a write of their
own. So no step waits for any of it, and what is lost with a node or a store is samples alone.
"""

import json
import logging
import os
import socket
import threading
from contextlib import suppress
from typing import Any, Self

from dan_dist.distributed.world import World
from dan_dist.tracking.journal import SYSTEM
from dan_dist.tracking.store import import_mlflow
from dan_dist.tracking.tracker import NullTracker

log = logging.getLogger(__name__)

INTERVAL, INTERVAL_S = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", 10.0


class SystemMetrics:
    """Samples this node while the block runs; on rank 0, records the samples of all nodes.

    MLflow's own variables name the node (MLFLOW_SYSTEM_METRICS_NODE_ID) and set the seconds
    between samples (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL).

    Raises:
        ValueError: that is no number of seconds.
    """

    def __init__(self, tracker: NullTracker, world: World) -> None:
        self._tracker, self._store, self._is_main = tracker, world.store, world.is_main
        self._monitors = _monitors(on_gpu=world.device.type == "cuda")
        self._node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or socket.gethostname()
        self._interval_s = interval_s()
        self._number = 0  # of this node's samples
        self._place = ""  # of this node's sample in the store
        self._recorded: dict[str, int] = {}  # place → the sample's number
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends with a last sample; a store that does not answer is not waited for."""
        self._ended.set()
        self._thread.join(self._interval_s)

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self._interval_s)
            try:
                self._pass_on(self._sample())
            except Exception as error:  # a store that has gone, a driver that fails: samples alone
                log.debug("no sample of %s: %s", self._node, error)

    def _sample(self) -> dict[str, float]:
        """What MLflow's monitors find on this node, by MLflow's names with the node's."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"{SYSTEM}{self._node}/{name}": float(value) for name, value in values.items()}

    def _pass_on(self, values: dict[str, float]) -> None:
        if self._is_main:
            self._tracker.system(values)
            self._collect()
        elif self._store is not None:
            if not self._place:
                self._place = f"system/{self._store.add('system/nodes', 1)}"
            self._number += 1
            self._store.set(self._place, json.dumps([self._number, values]))

    def _collect(self) -> None:
        """Records the last sample of each other node, once."""
        if self._store is None:
            return
        for number in range(1, self._store.add("system/nodes", 0) + 1):
            place = f"system/{number}"
            if not self._store.check([place]):  # asking for one that is not there would wait
                continue
            count, values = json.loads(self._store.get(place))
            if count > self._recorded.get(place, 0):
                self._recorded[place] = count
                self._tracker.system(values)


def interval_s() -> float:
    """The seconds between samples.

    Raises:
        ValueError: what the environment has is no number of seconds.
    """
    text = os.environ.get(INTERVAL) or str(INTERVAL_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(f"{INTERVAL} is {text!r} in the environment, expected seconds above 0")
    return seconds


def _monitors(*, on_gpu: bool) -> list[Any]:
    """MLflow's monitors of this node; imported here, so that no step waits for the import."""
    import_mlflow()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    if on_gpu:
        try:
            monitors.append(GPUMonitor())
        except (ImportError, RuntimeError) as error:
            log.warning("system metrics without the GPUs: %s", error)
    with suppress(Exception):  # the first reading of the CPU is of the time since it was imported
        monitors[0].collect_metrics()
        monitors[0].clear_metrics()
    return monitors
