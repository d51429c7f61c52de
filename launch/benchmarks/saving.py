"""What safety costs: checkpoints and the journal."""

import tempfile
import time
from pathlib import Path
from statistics import median

from dan_dist import checkpoint, parts, train
from dan_dist.config import Config
from dan_dist.engine import Votes
from dan_dist.journal import Journal
from dan_dist.shardset import open_shardset
from dan_dist.world import World


def run(config: Config, world: World, *, steps: int) -> dict[str, float]:
    """The share of an epoch that its checkpoint and its journal take from training.

    A checkpoint costs the copy that training waits for and what it slows the steps that run while
    it is written; the journal a flushed line each `train.log_every` steps.
    """
    parts.make_synthetic(config)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        shards = open_shardset(config.data.shards)
        split = shards.split("train")
        engine = parts.build_engine(
            config, world, parts.build_objective(config, shards.class_names, is_new=True)
        )
        stream = parts.open_train_stream(config, world, shards, split, start=0)
        writer = checkpoint.Writer(output, keep=1, stop_on_error=True)
        journal = Journal(output)
        quiet: list[float] = []
        busy: list[float] = []
        blocked: list[float] = []
        for step in range(steps):
            writing, began = writer.is_writing, time.perf_counter()
            result = engine.train_step(
                next(stream), lr=config.optim.lr, votes=Votes(False, False, 0)
            )
            result.losses.tolist()  # waits for a GPU
            if step > 10:  # the first ones are warming up
                (busy if writing else quiet).append(time.perf_counter() - began)
            if step > 10 and step % 20 == 0:
                began = time.perf_counter()
                state = {**train.FRESH, "step": step}
                content = {
                    **train.describe(config, shards, shards.class_names, state, None),
                    **engine.state(),
                }
                writer.write(step, content, is_best=True)
                blocked.append(time.perf_counter() - began)
        writer.close()
        stream.close()
        lines: list[float] = []
        for step in range(50):
            began = time.perf_counter()
            journal.append("metrics", values=dict.fromkeys("abcdefghij", 0.5), step=step)
            lines.append(time.perf_counter() - began)
        journal.close()
    step_s, epoch_steps = median(quiet), len(split) // config.train.global_batch
    slowed_s = max(sum(busy) - len(busy) * step_s, 0) / len(blocked)
    checkpoint_s = sum(blocked) / len(blocked) + slowed_s
    journal_s = median(lines) * epoch_steps / config.train.log_every
    share = (checkpoint_s + journal_s) / (epoch_steps * step_s)
    print(f"a step takes {1e3 * step_s:.0f} ms; for a checkpoint, training waits "
          f"{1e3 * median(blocked):.0f} ms, and the steps while it is written take "
          f"{1e3 * slowed_s:.0f} ms more; a line of the journal {1e3 * median(lines):.1f} ms\n"
          f"together {100 * share:.2f} % of an epoch of {epoch_steps} steps")  # fmt: skip
    return {"step_s": step_s, "checkpoint_s": checkpoint_s, "journal_s": journal_s, "share": share}
