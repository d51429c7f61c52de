"""Figures as files: no window is opened, wherever figures are drawn."""

from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from shards.files import write_atomically


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, in the format of the path's suffix, and frees it.

    Raises:
        OSError: it cannot be written; names the file.
    """
    buffer = BytesIO()
    try:
        figure.savefig(buffer, format=path.suffix[1:])
    finally:
        plt.close(figure)
    write_atomically(path, buffer.getvalue())
