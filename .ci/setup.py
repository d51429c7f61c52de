"""What the package depends on; everything else of it stands in pyproject.toml.

DALI is a package for each generation of CUDA, and two of them would be installed into one folder:
`DAN_CUDA=12 pip install .` takes that for drivers before 580.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

DALI = {"12": "nvidia-dali-cuda120>=2.4", "13": "nvidia-dali-cuda130>=2.4"}
DEPENDENCIES = [
    "torch>=2.11,<2.16",
    "torchvision>=0.26",
    "webdataset>=1.0",
    "deepspeed>=0.19",
    "mlflow>=3.10",
    "pydantic>=2.10",
    "pyyaml>=6",
    "safetensors>=0.4",
    "numpy>=2",
    "pillow>=11",
    "simplejpeg>=1.8",
    "matplotlib>=3.9",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "imagehash>=4.3",
    "tqdm>=4.66",
    "psutil>=6",
    "nvidia-ml-py>=12",  # the GPUs' load, which MLflow reads by it
    "fsspec",
]


class Sources(sdist):
    """An archive of the sources, with the build backend and this script, which build it."""

    def make_release_tree(self, base_dir: str, files: Sequence[str]) -> None:
        own = Path(__file__).parent.glob("*.py")
        super().make_release_tree(base_dir, [*files, *(os.path.relpath(path) for path in own)])


cuda = os.environ.get("DAN_CUDA", "13")
if cuda not in DALI:
    raise SystemExit(f"DAN_CUDA is {cuda!r}, expected {' or '.join(DALI)}")
setup(install_requires=[DALI[cuda], *DEPENDENCIES], cmdclass={"sdist": Sources})
