"""python -m shards.align --source DIR --weights FILE --out FILE: five landmarks of each face.

Needs `pip install -e '.[align]'` and a RetinaFace network as ONNX with landmarks (insightface's
`det_10g.onnx`, for one). The largest face of each image counts, if there is one.
"""

from shards import command

if __name__ == "__main__":  # before numpy is imported: a signal may come meanwhile
    command.align()

import argparse
import csv
import io
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from shards.files import write_atomically
from shards.folders import describe
from shards.images import decode
from shards.release import LeftOut
from shards.releases.sfew import LANDMARKS
from shards.releases.source import Source, read_file, walk

INPUT_SIDE = 640  # pixels to which an image is fitted for detection

Detector = Callable[[NDArray[np.uint8]], NDArray[np.float32] | None]

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for bad input, in one line)."""
    parser = argparse.ArgumentParser(prog="python -m shards.align", description=__doc__)
    parser.add_argument("--source", required=True, help="folder of images, searched to the bottom")
    parser.add_argument("--weights", required=True, help="RetinaFace with landmarks, ONNX")
    parser.add_argument("--out", required=True, help="the file of landmarks (CSV)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (default 0.5)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    return command.guarded(partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    detect = load_detector(options.weights, options.threshold)
    found, missed = write_landmarks(Path(options.source), detect, Path(options.out))
    print(f"{found} faces written to {options.out}; none found in {missed} images")
    return 0


def load_detector(weights: str | Path, threshold: float) -> Detector:
    """insightface's RetinaFace on a local file: (h, w, 3) RGB → (5, 2) landmarks or None."""
    if not Path(weights).is_file():
        raise FileNotFoundError(f"--weights {weights} not found; expected a RetinaFace ONNX file")
    try:
        from insightface.model_zoo.retinaface import RetinaFace
    except ImportError as error:
        raise OSError(f"{error}: pip install -e '.[align]' brings the detector") from error
    try:
        network: Any = RetinaFace(model_file=str(weights))
    except Exception as error:  # onnxruntime's own errors share no base but Exception
        raise ValueError(f"--weights {weights}: {str(error).splitlines()[0]}") from error
    if not network.use_kps:
        raise ValueError(f"--weights {weights}: this network gives no landmarks")
    network.prepare(ctx_id=0, input_size=(INPUT_SIDE, INPUT_SIDE), det_thresh=threshold)

    def detect(image: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        _, landmarks = network.detect(np.ascontiguousarray(image[..., ::-1]), max_num=1)
        return None if landmarks is None or not len(landmarks) else landmarks[0]

    return detect


def write_landmarks(source: Path, detect: Detector, out: Path) -> tuple[int, int]:
    """Writes `out` once every image was searched; returns faces found and images without."""
    if not source.is_dir():
        raise FileNotFoundError(f"--source {source} not found")
    left_out = LeftOut(source)
    images = list(walk(source, Source(source), left_out))
    if left_out.passed_over:
        log.warning("passed over: %s", describe(left_out.passed_over))
    if not images:
        raise FileNotFoundError(f"--source {source} holds no files")
    rows, missed = [], 0
    for relative in tqdm(images, desc="detecting faces", unit="img", disable=None):
        try:
            points = detect(np.asarray(decode(read_file(Source(source), relative)).convert("RGB")))
        except (ValueError, OSError) as error:
            log.warning("left out %s: %s", relative, error)
            points = None
        else:
            if points is None:
                log.warning("no face found in %s", relative)
        if points is None:
            missed += 1
            continue
        rows.append([relative, *(f"{value:.2f}" for value in points.ravel())])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([LANDMARKS, *rows])
    write_atomically(out, text.getvalue())
    return len(rows), missed
