"""A run's result: the test split, looked at once, after training, with the chosen weights.

`test.json` in the run's folder holds the result and every look. A run that has ended and is started
again does not look again; one that is extended does, and the record counts it.
"""

import json
from pathlib import Path
from typing import Any

from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.world import World
from dan_dist.evaluation.intervals import METHOD
from dan_dist.evaluation.judge import WHOLE, EvaluationResult, Rows, find_intervals
from dan_dist.evaluation.predictions import predict
from dan_dist.evaluation.records import PREDICTIONS, write_predictions
from dan_dist.evaluation.task import Task
from dan_dist.model.weights import Trained, load_trained
from dan_dist.run.checkpoint import BEST
from shards.files import sha256_of, write_atomically

RESULT = "test.json"


def look_once(
    folder: Path, task: Task, world: World, heart: Heartbeat, *, step: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """The result on the test split of a run that has ended after `step`, on all ranks.

    facts: about the run, for the record: `fingerprint` and `selected_on`.

    Raises:
        ValueError, OSError: an image, the checkpoint or a former record cannot be read.
    """
    known = json.loads(world.run_once(lambda: json.dumps(read_result(folder))))
    wanted = {"split": task.images.name, "step": step, **facts}
    if wanted.items() <= known.items():
        return dict(known)
    trained = world.run_on_all(lambda: load_trained(folder / BEST))
    world.check_equal(f"{trained.path}: its sha256", sha256_of(trained.path))
    rows = predict(trained, task.images, world, heart, "auto", task.select)
    result = {**wanted, **_describe(task, task.judge(rows), trained, rows)}
    look = {key: result[key] for key in ("split", "step", "weights_of_step", *WHOLE)}
    result["looks"] = [*known.get("looks", []), look]

    def record() -> None:
        write_predictions(folder / PREDICTIONS, task.images, rows, wanted)
        write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")

    world.run_once(record)
    return result


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a run that has looked at its test split; else empty.

    Raises:
        ValueError: the file is not one of ours. OSError: it cannot be read.
    """
    path = folder / RESULT
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        if not {"metrics", "intervals", "looks", "step"} <= found.keys():
            raise ValueError("a key is missing")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the result of a run ({error})") from error
    return dict(found)


def _describe(task: Task, judged: EvaluationResult, trained: Trained, rows: Rows) -> dict[str, Any]:
    metrics = judged.metrics
    return {
        "weights_of_step": trained.step,
        "images": len(task.images),
        **{key: metrics[key] for key in WHOLE},
        "metrics": metrics,
        "intervals": find_intervals(rows, task.images),
        "intervals_method": METHOD,
    }
