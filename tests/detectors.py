"""A face detector that sees faces at given places, read by the package that reads real ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIDE = 640  # pixels of what insightface shows a network
STRIDE = 8


def onnx_detector(
    path: Path, centres: Sequence[tuple[int, int]], *, half: int, score: float
) -> None:
    """A network of RetinaFace's outputs that always sees faces of 2 · `half` pixels at `centres`.

    Centres are multiples of STRIDE. The landmarks of each: eyes a half above and to the sides of
    the centre, the nose in it, the corners of the mouth a half below, and nearer to it.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    points = np.array([(-0.5, -0.4), (0.5, -0.4), (0, 0), (-0.4, 0.6), (0.4, 0.6)]) * half
    rows = {1: [score], 4: [half / STRIDE] * 4, 10: (points / STRIDE).ravel().tolist()}
    outputs, nodes = [], []
    for width, row in rows.items():
        for stride in (STRIDE, 16, 32):
            count = 2 * (SIDE // stride) ** 2
            values = np.zeros((count, width), np.float32)
            if stride == STRIDE:
                for x, y in centres:
                    values[2 * (y // STRIDE * (SIDE // STRIDE) + x // STRIDE)] = row
            name = f"out_{width}_{stride}"
            nodes.append(helper.make_node("Constant", [], [name],
                                          value=numpy_helper.from_array(values)))  # fmt: skip
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [count, width]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])
    graph = helper.make_graph(nodes, "always", [image], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
