"""What a GPU would run, as far as a machine without one can look at it."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from conftest import REPOSITORY
from dan_dist.config import load_config
from dan_dist.data import graph as graphs
from dan_dist.data.augment import MEAN, STD, Augment, placements
from dan_dist.data.graph import FILL, HW_DECODER_LOAD, batch_graph
from dan_dist.data.loader import Batch
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import StepResult
from dan_dist.engine.readout import Readout
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.monitor import Monitor
from dan_dist.run.plan import make_plan
from dan_dist.run.signals import StopRequest
from dan_dist.run.state import TrainState
from dan_dist.tracking.tracker import NullTracker

SOURCES = ("mixed", "pixels to gpu", "pixels on gpu")
SETTINGS = {"num_threads": 2, "device_id": None}  # None: defined, and never run, without a GPU


def no_data(iteration: int) -> tuple[object, ...]:
    raise AssertionError("the graph is not run")


def assert_legal(pipeline: Any) -> None:
    """Each operator exists on its device and gets each of its inputs where it wants it."""
    pipeline.serialize()  # which checks arguments
    registered = {
        "cpu": backend.RegisteredCPUOps(),
        "gpu": backend.RegisteredGPUOps(),
        "mixed": backend.RegisteredMixedOps(),
    }
    for operation in pipeline._ops:
        schema, device = operation._op.schema, operation._op.device
        assert schema.Name() in registered[device], (schema.Name(), device)
        operation.check_args()
        regular = operation.inputs[: schema.MaxNumInput()]
        for number, given in enumerate(regular):
            own = "cpu" if device == "mixed" else device
            assert given.device == schema.GetInputDevice(number, given.device, own), given
        for argument in operation.inputs[len(regular) :]:
            assert argument.device == "cpu", (schema.Name(), argument.name)


@pytest.mark.parametrize(
    ("source", "augment", "resize"), list(itertools.product(SOURCES, (True, False), (True, False)))
)
def test_the_loaders_graph_is_legal_on_a_gpu(source: str, augment: bool, resize: bool) -> None:
    pipeline = batch_graph(
        no_data, 224, resize, augment, source, batch_size=4, prefetch_queue_depth=2,
        exec_dynamic=True, **SETTINGS,
    )  # fmt: skip
    assert_legal(pipeline)
    assert [output.device for output in pipeline._graph_outputs] == ["gpu", "cpu"]


def test_the_graphs_that_decode_once_and_check_a_node_are_legal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dan_dist.data.decoded import _decoding_graph

    assert_legal(_decoding_graph("mixed", 224, batch_size=4, prefetch_queue_depth=1, **SETTINGS))
    monkeypatch.syspath_prepend(str(REPOSITORY / "slurm"))
    import health

    assert_legal(health._graph("cuda", batch_size=1, **SETTINGS))


def arguments(name: str) -> dict[str, Any]:
    """Those of the one operator of that name in the training graph."""
    pipeline = batch_graph(no_data, 224, False, True, "mixed", batch_size=4, **SETTINGS)
    pipeline.serialize()
    (operation,) = [o._op for o in pipeline._ops if o._op.schema.Name() == name]
    found: dict[str, Any] = operation._init_args
    return found


def test_one_decoder_decodes_all_images() -> None:
    """A share of each batch would make pixels depend on the place in it."""
    assert HW_DECODER_LOAD in (0, 1)
    assert arguments("decoders__Image")["hw_decoder_load"] == HW_DECODER_LOAD


def test_erased_pixels_are_whole_numbers_near_the_mean() -> None:
    """Of a fraction, a CPU cuts off what a GPU rounds."""
    assert tuple(arguments("Erase")["fill_value"]) == FILL
    assert all(float(value).is_integer() for value in FILL)
    assert all(abs(v / 255 - m) / s < 0.009 for v, m, s in zip(FILL, MEAN, STD, strict=True))


def augmented(image: np.ndarray, augment: Augment, uniforms: np.ndarray) -> np.ndarray:
    """One image by the CPU's graph, as bytes again."""
    size = len(image)
    own = placements(uniforms[None].astype(np.float32), augment, size)

    def feed(iteration: int) -> tuple[object, ...]:
        pixels = graphs.as_batch([graphs.TensorCPU(image, "HWC")])
        return pixels, np.zeros((1, 2), np.int64), *own

    pipeline = batch_graph(feed, size, False, True, "pixels", batch_size=1, **SETTINGS)
    pipeline.build()
    images, _ = pipeline.run()
    values = np.asarray(images[0]) * np.array(STD) + np.array(MEAN)
    return np.round(255 * values).astype(int)


def test_erased_pixels_are_whole_numbers_on_the_cpu() -> None:
    uniforms = np.full(17, 0.5)
    uniforms[6] = 0.0  # erased
    image = np.full((32, 32, 3), 7, np.uint8)
    found = augmented(image, Augment(erase_p=1.0), uniforms)
    assert {tuple(p) for p in found.reshape(-1, 3).tolist()} == {FILL, (7, 7, 7)}


def borders(matrix: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, S) distances of each pixel's source from the next pixel's border; (2, S²) the sources."""
    y, x = np.mgrid[:size, :size] + 0.5
    sources = matrix @ np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
    return np.abs(sources - np.round(sources)).min(axis=0).reshape(size, size), sources


def test_a_warp_depends_on_rounding_at_the_borders_of_pixels_alone() -> None:
    """Where a CPU and a GPU, which round otherwise, give another pixel: there, and how often."""
    size, augment = 64, Augment(0.5, 1.0, 20, (0.8, 1.0), 0.2)
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (size, size, 3)).astype(np.uint8)
    near = 0
    for _ in range(8):
        uniforms = generator.random(17)
        matrix = placements(uniforms[None].astype(np.float32), augment, size).matrix[0]
        distance, (x, y) = borders(matrix.astype(np.float64), size)
        is_inside = (x >= 0) & (y >= 0) & (x < size) & (y < size)
        columns, rows = (np.clip(np.floor(c), 0, size - 1).astype(int) for c in (x, y))
        expected = np.where(is_inside[:, None], image[rows, columns], 0).reshape(size, size, 3)
        differs = (augmented(image, augment, uniforms) != expected).any(axis=2)
        assert not differs[distance > 1e-3].any()
        near += int((distance <= 1e-3).sum())
    assert near < 0.01 * 8 * size * size


class FakeCuda:
    """Notes what is recorded and waited for, in the order of the operations around it."""

    def __init__(self, noted: list[str]) -> None:
        self.noted, self.events = noted, 0

    def event(self) -> "FakeEvent":
        self.events += 1
        return FakeEvent(self.noted, self.events)


class FakeEvent:
    def __init__(self, noted: list[str], number: int) -> None:
        self.noted, self.number = noted, number

    def record(self) -> None:
        self.noted.append(f"record {self.number}")

    def synchronize(self) -> None:
        self.noted.append(f"wait {self.number}")


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    """That of a rank which has nothing to print."""
    config = load_config("configs/demo.yaml", ["train.log_every=99"])
    loader: Any = SimpleNamespace(wait_s=0.0, replaced=0)
    plan = make_plan(config, images=6400, start=0)
    world = World(1, 1, 2, 2, torch.device("cpu"))
    with Monitor(
        config.train, world, plan, TrainState(), NullTracker(), loader, StopRequest()
    ) as found:
        yield found


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeCuda(found).event)
    plain = torch.empty
    monkeypatch.setattr(  # pinned memory needs a driver
        torch,
        "empty",
        lambda *a, **k: plain(*a, **{n: v for n, v in k.items() if n != "pin_memory"}),
    )
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [0.0] * 13, raising=False)
    return found


def test_figures_are_read_behind_their_own_step(noted: list[str], monitor: Monitor) -> None:
    """The figures of step n are under way before step n + 1 is launched, and waited for after."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda", 0)
        for step in (2, 3, 4):
            noted.append(f"launch {step}")
            figures = torch.zeros(8, device=device)
            result = StepResult(figures[:4], figures[4:7], figures[7], figures[7], figures[:4])
            monitor.step(step, Batch(figures, figures, figures), result)
    assert noted == [
        "launch 2", "record 1", "launch 3", "wait 1", "record 2", "launch 4", "wait 2", "record 3"
    ]  # fmt: skip


def test_figures_on_a_cpu_are_read_as_they_are() -> None:
    assert Readout(torch.arange(3.0)).read() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("precision", "allowed"), [("float32", False), ("bf16", False), ("tf32", True)]
)
def test_float32_is_float32_and_tf32_has_its_own_name(precision: str, allowed: bool) -> None:
    try:
        choose_arithmetic(precision)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
        assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if allowed else "none")
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if allowed else "ieee")
    finally:
        choose_arithmetic("float32")


def test_determinism_is_asked_for_by_name() -> None:
    try:
        choose_arithmetic("bf16", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        choose_arithmetic("bf16")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        choose_arithmetic("float32")
