"""DDP beside DeepSpeed's stages: is it the same training?"""

import json
import tempfile
import time
from pathlib import Path

from benchmarks.measure import torchrun


def run(
    path: str, overrides: list[str], *, steps: int, ranks: list[int]
) -> dict[str, dict[str, float]]:
    """The loss curve of each engine, stage and number of ranks beside that of DDP on one rank.

    At a learning rate of 1e-6: at the recipes' own, a difference in the last bit soon is one in the
    first (see the README on chaos).
    """
    rows: dict[str, dict[str, float]] = {}
    first: list[float] = []
    print("| engine | ranks | final loss | largest difference | seconds |\n|---|---|---|---|---|")
    kinds = {"DDP": ["engine.name=ddp"]} | {
        f"ZeRO {stage}": ["engine.name=deepspeed", f"engine.zero_stage={stage}"]
        for stage in range(4)
    }
    for size in ranks:
        for name, options in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                losses, seconds = _curve(path, steps, size, Path(folder), [*overrides, *options])
            first = first or losses
            worst = max(abs(a - b) for a, b in zip(losses, first, strict=True))
            print(
                f"| {name} | {size} | {losses[-1]:.5f} | {worst:.1e} | {seconds:.1f} |", flush=True
            )
            rows[f"{name}, {size} ranks"] = {
                "final_loss": losses[-1], "largest_difference": worst, "seconds": seconds
            }  # fmt: skip
    return rows


def _curve(
    path: str, steps: int, ranks: int, output: Path, options: list[str]
) -> tuple[list[float], float]:
    """The loss of every step of a training, from its journal, and the seconds it took in all."""
    began = time.perf_counter()
    torchrun(
        ranks, "train.py", path, f"train.max_steps={steps}", "train.log_every=1", "optim.lr=1e-6",
        "train.precision=float32", f"train.output={output}", *options,
        MLFLOW_TRACKING_URI=f"sqlite:///{output}/mlflow.db",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    values = [line["values"] for line in lines if line["kind"] == "metrics"]
    return [v["train/loss"] for v in values if "train/loss" in v], seconds
