"""A certificate of a training's data: hashes that are the same at all worlds and after a resume.

For each step, of the global batch in the order of its columns: the sample ids, the augmentation's
numbers, and each image's pixels as the network gets them. And the loss, in float64 at a learning
rate at which the network stays as it is: to the bit at the same world, within 1e-9 across worlds,
which sum in another order.
"""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import nvidia.dali
import torch
import torch.distributed as dist

from dan_dist.build import build_engine, initial_objective, open_data, open_train_loader
from dan_dist.config import Config, flatten, load_config
from dan_dist.data.augment import UNIFORMS
from dan_dist.data.sampler import augmentation_uniforms, rank_columns
from dan_dist.distributed.heartbeat import session
from dan_dist.engine.ddp import StepFlags
from dan_dist.options import CertifyOptions
from dan_dist.run.checkpoint import save
from dan_dist.tracking.tracker import RunRecord, check_recorded, record_run
from dan_dist.values import variables
from shards.files import scratch_folder, write_atomically

log = logging.getLogger(__name__)

FORMAT = "dan_dist certificate, version 1"
CERTIFICATE = "certificate.json"
HASHED = ("ids", "augmentation", "pixels")
TOLERANCE = 1e-9  # between the losses of two worlds
LEARNING_RATE = 1e-7
FIXED = [
    "train.precision=float64", f"optim.lr={LEARNING_RATE}", "engine.name=ddp", "train.compile=false"
]  # fmt: skip


NO_FLAGS = StepFlags(stop=False, save=False, replaced=0)


class Difference(NamedTuple):
    """Where two runs part."""

    part: str  # of HASHED, or "loss"
    step: int  # from 0


def main(options: CertifyOptions) -> list[str]:
    """Makes a certificate, or compares two; returns a line for each part that is not equal.

    Raises:
        ValueError, OSError: bad input, or a training that cannot be certified.
    """
    files = [Path(word) for word in options.words if word.endswith(".json")]
    if len(files) == 2 == len(options.words):
        return compare(*files)
    if files or options.steps is None or options.steps < 2:
        raise ValueError("expected a configuration and --steps N of 2 or more, or two certificates")
    config = load_config(options.words[0], [*options.words[1:], *FIXED])
    if options.part is not None:
        record(config, options)
        return []
    return certify(config, options, options.steps)


def certify(config: Config, options: CertifyOptions, steps: int) -> list[str]:
    """Runs each world, and the first one's second half once more, resumed; writes it all.

    Raises:
        ValueError: no such worlds, or MLflow will not take the result; before anything is computed.
    """
    worlds = _worlds(options.worlds, config.train.global_batch)
    if config.tracking.enabled:
        check_recorded(config.tracking.experiment, config.tracking.run_name)
    with scratch_folder() as folder:
        runs = []
        for start, world in [*((0, w) for w in worlds), (steps // 2, worlds[0])]:
            log.info("%d steps of world %d%s", steps - start, world,
                     f", resumed after step {start}" if start else "")  # fmt: skip
            path = folder / f"{world}-{start}.json"
            launch(replace(options, part=path, begin=start), world)
            runs.append(json.loads(path.read_text()))
    facts = runs[0].pop("facts")
    for run in runs[1:]:
        run.pop("facts")
    content = {"format": FORMAT, **facts, "steps": steps, "runs": runs}
    output = Path(config.train.output) / "certificate"
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / CERTIFICATE, json.dumps(content, indent=1) + "\n")
    parted = []
    for run in runs[1:]:
        name = f"world {run['world']}" + (f" resumed after {run['start']}" if run["start"] else "")
        parted += _report(f"{name} and world {worlds[0]}", runs[0], run)
    if config.tracking.enabled:
        _track(config, output, facts, len(parted))
    log.info("%s", output / CERTIFICATE)
    return parted


def record(config: Config, options: CertifyOptions) -> None:
    """One world's run, on each of its ranks; rank 0 writes it to `options.part`."""
    assert options.part is not None and options.steps is not None
    train, start, steps = config.train, options.begin, options.steps
    kept = options.part.parent / "half.pt"
    with session(train.device, timeout_s=train.timeout_s, on_loss=lambda _: None) as (world, heart):
        data = open_data(config, world)
        objective = initial_objective(config, data.class_names, is_new=True)
        engine = build_engine(config, world, objective)
        if start:
            engine.load_state(torch.load(kept, map_location="cpu", weights_only=True))
        columns = rank_columns(train.global_batch, world.rank, world.size)
        own, losses = [], []
        with open_train_loader(config, world, data.train, start=start) as batches:
            for step in range(start, steps):
                if step == steps // 2 and not start:
                    state = engine.state()
                    if world.is_main and not kept.exists():
                        save(kept, state)
                heart.beat("step", step + 1)
                batch = next(batches)
                uniforms = augmentation_uniforms(train.seed, step, train.global_batch, UNIFORMS)
                images = batch.images.cpu().contiguous().numpy()
                pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
                own.append((batch.ids.tolist(), uniforms[columns].tobytes(), pixels))
                result = engine.train_step(batch, lr=LEARNING_RATE, flags=NO_FLAGS)
                losses.append(float(result.losses[0]))
            heart.finish()
        ranks: list[Any] = [own]
        if world.size > 1:
            ranks = [None] * world.size
            dist.all_gather_object(ranks, own)
        if world.is_main:
            content = {"world": world.size, "start": start, **_hashes(ranks), "loss": losses,
                       "facts": _facts(config, data.describe(config), world.device)}  # fmt: skip
            write_atomically(options.part, json.dumps(content))


def compare(first: Path, second: Path) -> list[str]:
    """Compares the first runs of two certificates, and any of the same world."""
    a, b = (_read(path) for path in (first, second))
    for key in ("fingerprint", "device", "decoder", "torch", "dali"):
        if a[key] != b[key]:
            log.info("%s: %s in %s, %s in %s", key, a[key], first, b[key], second)
    others = {(run["world"], run["start"]): run for run in b["runs"]}
    pairs = [(a["runs"][0], b["runs"][0])]
    for run in a["runs"][1:]:
        if (same := others.get((run["world"], run["start"]))) is not None:
            pairs.append((run, same))
    parted = []
    for one, other in pairs:
        parted += _report(f"world {one['world']} and world {other['world']}", one, other)
    return parted


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[Difference]:
    """The first step at which each part of two runs differs, where one does."""
    begin = max(first["start"], second["start"])
    is_same_world, found = first["world"] == second["world"], []
    for part in (*HASHED, "loss"):
        both = zip(*(run[part][begin - run["start"] :] for run in (first, second)), strict=False)
        for step, (a, b) in enumerate(both, begin):
            if a != b and (part != "loss" or is_same_world or not abs(a - b) <= TOLERANCE):
                found.append(Difference(part, step))
                break
    return found


def _report(names: str, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Logs which parts of two runs are equal; the lines of those that are not."""
    found = dict(differences(first, second))
    steps = min(run["start"] + len(run["ids"]) for run in (first, second))
    within = "" if first["world"] == second["world"] else f" within {TOLERANCE:g}"
    equal = [part + (within if part == "loss" else "") for part in (*HASHED, "loss")
             if part not in found]  # fmt: skip
    log.info("%s: equal up to step %d: %s", names, steps, ", ".join(equal) or "nothing")
    lines = [f"{names}: {part} part at step {step}" for part, step in found.items()]
    for line in lines:
        log.warning("%s", line)
    return lines


def launch(options: CertifyOptions, world: int) -> None:
    """Runs this program for the part of one world under torchrun."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={world}", "-m", "dan_dist", "certify", *options.words,
        "--steps", str(options.steps), "--part", str(options.part), "--begin", str(options.begin),
    ]  # fmt: skip
    code = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH"))))
    # SAFEPATH: `python -m` would import another clone's code where that is the working folder.
    environment = {**variables(), "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise ValueError((errors or [f"world {world} failed\n{done.stderr}"])[0][:4000])


def _worlds(text: str, global_batch: int) -> list[int]:
    worlds = [int(word) for word in text.split(",") if word.strip().isdigit()]
    if len(worlds) != text.count(",") + 1 or not all(0 < w <= global_batch for w in worlds):
        raise ValueError(f"--worlds is '{text}', expected numbers from 1 to {global_batch}")
    return worlds


def _hashes(ranks: Sequence[Any]) -> dict[str, list[str]]:
    """Each step's hashes over the columns of all ranks."""
    found: dict[str, list[str]] = {part: [] for part in HASHED}
    for step in zip(*ranks, strict=True):
        ids = [i for own, _, _ in step for i in own]
        pixels = [image for _, _, own in step for image in own]
        found["ids"].append(_sha256(json.dumps(ids).encode()))
        found["augmentation"].append(_sha256(b"".join(numbers for _, numbers, _ in step)))
        found["pixels"].append(_sha256("".join(pixels).encode()))
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _facts(config: Config, data: dict[str, Any], device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        **data,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "decoder": "nvJPEG" if on_gpu else "libjpeg-turbo",
        "torch": torch.__version__,
        "dali": nvidia.dali.__version__,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != FORMAT or not content["runs"]:
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a certificate, expected '{FORMAT}'") from error
    return content


def _track(config: Config, output: Path, facts: dict[str, Any], parted: int) -> None:
    """A run of its own in MLflow, beside the training's."""
    record = RunRecord(
        experiment=config.tracking.experiment,
        name=f"certify {config.tracking.run_name or Path(config.train.output).name}",
        params=flatten(config.model_dump()),
        config=config.model_dump(),
        tags={"kind": "certificate", "fingerprint": facts["fingerprint"]},
    )
    metrics = {"parts_that_differ": float(parted)}
    record_run(output, record, metrics=metrics, step=0, artifacts=[CERTIFICATE])
