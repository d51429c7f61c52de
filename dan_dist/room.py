"""What a run needs of memory and disk: stated before it starts, and refused where it cannot be."""

import logging
import shutil
from pathlib import Path

import torch

from dan_dist.config import Config
from dan_dist.distributed.world import World
from dan_dist.engine.passes import micro_steps
from dan_dist.engine.precision import resolve_precision
from dan_dist.model.dan import DAN, WIDTH
from shards.limits import memory_bytes

log = logging.getLogger(__name__)

# Numbers of ResNet-18's forward pass that its backward pass needs, for each pixel of the input: 121
# in float32, 129 in bfloat16, with four heads, counted by saved_tensors_hooks. Fewer, as what is
# refused must be more than there is.
NUMBERS_A_PIXEL = 100
NUMBER_BYTES = {"bf16": 2, "fp16": 2, "float64": 8}  # else 4
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1}  # of an optimiser, for each weight


def check_room(config: Config, world: World, classes: int, *, is_here: bool = True) -> None:
    """Logs on rank 0 how much of the disk the run takes at most.

    is_here: else it runs on nodes of which nothing is known; what a step needs is logged then.

    Raises:
        ValueError: a step needs more memory than this rank can have.
    """
    with torch.device("meta"):  # shapes alone
        network = DAN(classes, config.model.heads, width=config.model.width)
    weights = sum(weight.numel() for weight in network.parameters())
    check_memory(config, world, weights, is_here=is_here)
    if world.is_main:
        log_disk(config, weights)


def check_memory(config: Config, world: World, weights: int, *, is_here: bool = True) -> None:
    """Refuses a step that needs more memory than there is; what it may need beside that is its own.

    Raises:
        ValueError: names what is needed, what there is, and the key to change.
    """
    train, size = config.train, config.model.image_size
    precision = resolve_precision(train.precision, world.device, config.engine.name)
    if not is_here and train.precision == "auto":
        precision = "bf16"  # the least that a GPU takes
    share = -(-train.global_batch // world.size)
    images = -(-share // micro_steps(train.global_batch, train.micro_batch, world.size))
    is_double = 2 if precision == "float64" else 1
    state = weights * 4 * is_double * (2 + MOMENTS[config.optim.name])
    numbers = NUMBERS_A_PIXEL * config.model.width // WIDTH
    image = numbers * NUMBER_BYTES.get(precision, 4) * size**2
    needed = state + images * image + share * 3 * size**2
    what = f"{images} images of {size} px at once need more than {_size(needed)} of memory"
    if not is_here:
        log.info("memory: %s on each rank", what)
        return
    there = memory_bytes() // world.local_size
    if world.device.type == "cuda":
        there = torch.cuda.get_device_properties(world.device).total_memory
    if needed <= there:
        return
    room = int((there - state - share * 3 * size**2) // image)
    way = "a smaller model.heads, model.image_size or train.global_batch"
    if room > 0:
        way = f"train.micro_batch={room} or less, or a smaller model.image_size"
    raise ValueError(f"{what}, {world.device} has {_size(there)} for a rank; give {way}")


def log_disk(config: Config, weights: int) -> None:
    """States what checkpoints take: the newest ones, one under way, and the best."""
    number = 8 if config.train.precision == "float64" else 4
    average = config.optim.ema is not None
    best = weights * number * (1 + average)
    whole = best + weights * number * MOMENTS[config.optim.name]
    count = config.train.keep_checkpoints + 1
    folder = Path(config.train.output)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, most = shutil.disk_usage(there).free, count * whole + best
    model = f", and {_size(best)} in MLflow" if config.tracking.enabled else ""
    line = (
        f"disk: at most {_size(most)} in {folder} ({count} checkpoints of {_size(whole)}, the best "
        f"of {_size(best)}){model}; {_size(free)} are free"
    )
    log.log(logging.INFO if most < free else logging.WARNING, line)


def _size(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e10 else f"{count / 1e9:,.0f} GB"
