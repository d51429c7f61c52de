"""Whether this node can train: python slurm/health.py cuda|cpu. Ends with 1 and a line if not."""

import sys

import numpy as np
from nvidia.dali import fn, pipeline_def


@pipeline_def(batch_size=1, num_threads=1)  # type: ignore[untyped-decorator]
def _graph(device: str) -> object:
    images = fn.constant(idata=list(range(12)), shape=[2, 2, 3])  # type: ignore[attr-defined]
    return fn.crop_mirror_normalize(images.gpu() if device == "cuda" else images)


def main(device: str) -> int:
    """Touches every GPU of the node, then runs a DALI graph."""
    try:
        if device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise RuntimeError("torch finds no GPU")
            for number in range(torch.cuda.device_count()):
                torch.ones(1, device=f"cuda:{number}").sum().item()
        graph = _graph(device, device_id=0 if device == "cuda" else None)
        graph.build()
        (output,) = graph.run()
        assert np.asarray(output.as_cpu()[0]).size == 12
    except Exception as error:  # whatever a broken driver makes torch or DALI raise
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
