"""Whether this node can train: python slurm/health.py cuda|cpu. Ends with 1 and a line if not."""

import os
import sys

import numpy as np
from nvidia.dali import fn, pipeline_def


@pipeline_def(batch_size=1, num_threads=1)  # type: ignore[untyped-decorator]
def _graph(device: str) -> object:
    images = fn.constant(idata=list(range(12)), shape=[2, 2, 3])  # type: ignore[attr-defined]
    return fn.crop_mirror_normalize(images.gpu() if device == "cuda" else images)


def _run_graph(gpu: int | None) -> None:
    graph = _graph("cpu" if gpu is None else "cuda", device_id=gpu)
    graph.build()
    (output,) = graph.run()
    assert np.asarray(output.as_cpu()[0]).size == 12


def check(device: str, expected_gpus: int | None) -> None:
    """Runs a DALI graph, on every GPU of the node if it is to train on them.

    Raises:
        RuntimeError: and whatever a broken driver makes torch or DALI raise.
    """
    if device == "cpu":
        _run_graph(None)
        return
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        raise RuntimeError("torch finds no GPU")
    if expected_gpus not in (None, gpus):
        raise RuntimeError(f"torch finds {gpus} GPUs, Slurm gives {expected_gpus}")
    for gpu in range(gpus):
        try:
            torch.ones(1, device=f"cuda:{gpu}").sum().item()
            _run_graph(gpu)
        except Exception as error:
            raise RuntimeError(f"GPU {gpu}: {error}") from error


def main(device: str) -> int:
    expected = os.environ.get("SLURM_GPUS_ON_NODE")
    try:
        check(device, int(expected) if expected else None)
    except Exception as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
