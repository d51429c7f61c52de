"""Measures the pipeline on this machine, each figure beside a peer's from the same run.

python launch/bench.py [PART …] [CONFIG] [section.key=value …] [--json FILE]
torchrun --nproc-per-node=N launch/bench.py train [CONFIG] …

CONFIG is a YAML file, or the name of a shipped one.

Parts (without any, all):

loader    beside its in-memory ceiling, the authors' way, webdataset's and DALI's own readers
step      the training step beside its plainest form, what each optimisation adds, and the roofline
train     end to end, beside loader and step alone; the share of time spent waiting for data
scaling   1 … N ranks of this machine; 1, 8, 16 and 64 GPUs, strong and weak, projected from parts
start     from launch to the first step
order     the sampler's time, and the memory of a rank, up to ten million images; with --peers,
          beside the orders of five others, each in an environment that is made for it (some GB)

With --visit FOLDER, checks on this machine's GPU, and all parts but scaling and order, within
--minutes; each is a process of its own.

Where the configuration's shards are not there, faces are drawn in their place, of 80,000 classes
for configs/msceleb.yaml; networks start at random. Parts are of configs/affectnet8.yaml, of
configs/demo.yaml for start.
"""

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's code comes first

from shards.command import listen

if __name__ == "__main__":
    listen()  # a signal may come during the imports below

import torch
from nvidia import dali

from benchmarks import loader, order, scaling, start, step, training, visit
from benchmarks.peers import table as peers
from dan_dist.config import Config, find_config, layered, load_config
from dan_dist.distributed.world import World, close_world, init_world
from dan_dist.run.cli import run
from dan_dist.run.signals import StopRequest
from shards.demo import ensure
from shards.format import MANIFEST, ShardSet, open_shardset
from shards.limits import core_count
from shards.releases import synthetic

RECIPE = "configs/affectnet8.yaml"
PARTS = ("loader", "step", "train", "scaling", "start", "order")
SMALL_BATCH = 32  # images, of which a CPU makes a step in seconds
DRAWN, DRAWN_VAL = 4096, 80  # faces for training and validation


def main(arguments: list[str], _: StopRequest) -> int:
    """Runs the parts; prints tables, and JSON to a file where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="parts, a configuration, overrides of its keys")
    parser.add_argument("--config", help="the same as CONFIG")
    parser.add_argument("--repeats", type=_count, default=5, help="default 5; medians are printed")
    parser.add_argument("--images", type=_count, help="to draw (and three quarters to load in each "
                        "repeat); default 4096")  # fmt: skip
    parser.add_argument("--batch", type=_count, help="of a rank; default the recipe's, and "
                        f"{SMALL_BATCH} where a CPU computes the steps")  # fmt: skip
    parser.add_argument("--steps", type=_count, help="default: a few")
    parser.add_argument("--ranks", type=_count, nargs="+", help="scaling (default 1 … N)")
    parser.add_argument("--link-gb-s", type=float, default=50, help="of one node, to the others, "
                        "for scaling's projection (default 50: 400 Gbit/s)")  # fmt: skip
    parser.add_argument("--tried", action="store_true", help="step: what was left out as well")
    parser.add_argument("--peers", action="store_true", help="order: beside its peers' as well")
    parser.add_argument("--visit", type=Path, help="a folder for a GPU's checks and figures")
    parser.add_argument("--minutes", type=float, default=4, help="of --visit (default 4)")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_intermixed_args(arguments)  # options may stand between what is named
    chosen, paths, overrides = _sorted(options.what)
    paths += [options.config] if options.config is not None else []
    if len(paths) > 1:
        raise ValueError(f"two configurations: {', '.join(paths)}")
    if options.visit:
        if chosen:
            raise ValueError(f"--visit has its own parts; it takes no '{chosen[0]}'")
        path = paths[0] if paths else RECIPE
        found = _shards(load_config(path, overrides), options.visit, options.images or DRAWN)
        words = [path, *overrides, f"data.shards={found.resolve()}"]
        batches = [options.batch] if options.batch else visit.BATCHES
        parts = visit.parts(options.visit, words, batches)
        done = visit.run(options.visit, parts, minutes=options.minutes)
        return int(any(part["result"] != "done" for part in done.values()))
    world = init_world()
    if world.size > 1 and chosen != ["train"]:
        raise ValueError("several ranks are for the part 'train' alone; scaling starts its own")
    logging.getLogger("dan_dist").setLevel(logging.WARNING)
    figures: dict[str, Any] = {"machine": _machine(world)}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(world.run_once(lambda: scratch))
        for name in chosen or PARTS:
            default = "configs/demo.yaml" if name == "start" else RECIPE
            path = paths[0] if paths else default
            figures[name] = _part(name, path, overrides, options, world, folder)
        world.run_once(lambda: None)  # rank 0's folder stays until all are here
    if options.json and world.is_main:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    close_world(world)
    return 0


def _sorted(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Parts, configurations and overrides.

    Raises:
        ValueError: a word is none of these.
    """
    chosen: list[str] = []
    paths: list[str] = []
    for word in (word for word in words if "=" not in word):
        if word in PARTS:
            chosen.append(word)
            continue
        try:
            find_config(word)
        except FileNotFoundError as error:
            raise ValueError(f"no such part, known are {', '.join(PARTS)}; {error}") from error
        paths.append(word)
    return chosen, paths, [word for word in words if "=" in word]


def _part(
    name: str,
    path: str,
    overrides: list[str],
    options: argparse.Namespace,
    world: World,
    folder: Path,
) -> Any:
    """One part's figures."""
    repeats, steps, on_gpu = options.repeats, options.steps, world.device.type == "cuda"
    images = options.images or DRAWN
    if name == "order":
        measured = order.run(folder, repeats=repeats)
        kept = Path(options.folder) if options.folder else folder  # where environments stay
        return {**measured, "peers": peers.run(kept / "peers")} if options.peers else measured
    if name == "start":
        return start.run(path, overrides, folder / "start", repeats=repeats)
    small = not on_gpu and name != "loader"
    batch = options.batch or (SMALL_BATCH if small else None)
    config, shards = _of_recipe(path, overrides, world, folder, batch=batch, images=images)
    if name == "loader":
        return loader.run(config, world, shards, folder, images=images * 3 // 4, repeats=repeats)
    if name == "step":
        return step.run(
            config, world, shards, steps=steps or (30 if on_gpu else 2), repeats=repeats,
            tried=options.tried,
        )  # fmt: skip
    if name == "train":
        return training.run(
            config, world, shards, steps=steps or (100 if on_gpu else 10), repeats=repeats
        )
    return scaling.run(
        [path, *overrides], config, world, shards, ranks=options.ranks,
        steps=steps or (100 if on_gpu else 4), repeats=repeats, link_gb_s=options.link_gb_s,
    )  # fmt: skip


def _of_recipe(
    path: str, overrides: list[str], world: World, folder: Path, *, batch: int | None, images: int
) -> tuple[Config, ShardSet]:
    """A configuration with a rank's batch (None: the recipe's), and its shards or drawn faces."""
    config = load_config(path, overrides)
    found = Path(world.run_once(lambda: str(_shards(config, folder, images))))
    batch = batch or config.train.global_batch
    own = [f"train.global_batch={batch * world.size}", f"data.shards={found}", "data.classes=null",
           "model.backbone=none", "model.weights=null", "model.weights_classes=null"]  # fmt: skip
    return load_config(path, layered(overrides, own)), open_shardset(found)


def _shards(config: Config, folder: Path, images: int) -> Path:
    """The configuration's shards, or as many faces drawn in the folder where they are not there."""
    if (Path(config.data.paths[0]) / MANIFEST).exists():
        return Path(config.data.paths[0])
    found, size = folder / f"faces-{config.model.image_size}", config.model.image_size
    drawn = synthetic.release(images, DRAWN_VAL, size=size, seed=0)
    if config.task == "identity":  # as many classes, whoever the faces are
        names = tuple(f"person {k}" for k in range(order.IDENTITIES))
        drawn = replace(drawn, class_names=names, mixed=True)
    ensure(found, drawn, size=size)
    return found


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number


def _machine(world: World) -> str:
    """What the figures were measured on."""
    device = f"{core_count()} CPU cores ({_cpu()})"
    if world.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(world.device)}, {device}"
    text = f"{device}, torch {torch.__version__}, DALI {dali.__version__}, {date.today()}"
    if world.is_main:
        print(text, flush=True)
    return text


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


if __name__ == "__main__":
    run(main)
