"""Whether this node can train: python slurm/health.py cuda|cpu. Ends with 1 and a line if not."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's code comes first

from dan_dist.data.graph import decode

COLOUR, SIZE = (200, 100, 50), 64  # of an image in one colour


@pipeline_def(batch_size=1, num_threads=1)  # type: ignore[untyped-decorator]
def _graph(device: str) -> Any:
    jpegs = fn.external_source(source=lambda: [_jpeg()], dtype=types.UINT8, ndim=1, batch=True)
    return decode(jpegs, "mixed" if device == "cuda" else "cpu", None)


def _jpeg() -> Any:
    content = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), COLOUR).save(content, "JPEG", quality=95)
    return np.frombuffer(content.getvalue(), np.uint8)


def _decode_image(gpu: int | None) -> None:
    """As the loader does.

    Raises:
        RuntimeError: it gives other pixels.
    """
    graph = _graph("cpu" if gpu is None else "cuda", device_id=gpu)
    graph.build()
    (output,) = graph.run()
    image = np.asarray(output.as_cpu()[0]).astype(int)
    if image.shape != (SIZE, SIZE, 3) or np.abs(image - COLOUR).max() > 3:
        raise RuntimeError(f"DALI decodes an image of {COLOUR} as {image[0, 0].tolist()}")


def _sum_over_gpus(gpus: int) -> None:
    """By nccl.

    Raises:
        RuntimeError: it fails, or the sum is wrong.
    """
    import torch

    cuda: Any = torch.cuda
    parts = [torch.full((1024,), float(gpu), device=f"cuda:{gpu}") for gpu in range(gpus)]
    try:
        cuda.nccl.all_reduce(parts)
        found = {float(part.max().item()) for part in parts}
    except Exception as error:
        raise RuntimeError(f"nccl over {gpus} GPUs: {error}") from error
    if found != {sum(range(gpus))}:
        raise RuntimeError(f"nccl over {gpus} GPUs sums {gpus} numbers to {sorted(found)}")


def check(device: str, expected_gpus: int | None) -> None:
    """Decodes an image, on every GPU of the node if it is to train on them, and sums over these.

    Raises:
        RuntimeError: and whatever a broken driver makes torch or DALI raise.
    """
    if device == "cpu":
        _decode_image(None)
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
            _decode_image(gpu)
        except Exception as error:
            raise RuntimeError(f"GPU {gpu}: {error}") from error
    _sum_over_gpus(gpus)


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
