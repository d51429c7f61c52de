"""Where a run comes from, in MLflow's own words: user, program, code, libraries."""

import getpass
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dan_dist.distributed.device import device_name

DRIVER = Path("/proc/driver/nvidia/version")
GIT_S = 20.0  # a checkout on a slow disk
UNKNOWN = "unknown"


def provenance() -> dict[str, str]:
    """The tags of a run that name its origin; what is not known is left out."""
    return {
        "mlflow.user": _user(),
        "mlflow.source.name": _program(),
        "mlflow.source.type": "LOCAL",
        **checkout(),
        **libraries(),
    }


def checkout() -> dict[str, str]:
    """The commit of this code, its branch, and whether a tracked file differs from it.

    The commit is "unknown" outside a checkout of this code.
    """
    file = Path(__file__)  # an installed copy may lie in somebody else's checkout, untracked
    lines = _git("rev-parse", "HEAD", f"HEAD:./{file.name}").split()
    if not lines:
        return {"commit": UNKNOWN}
    commit, branch = lines[0], _git("rev-parse", "--abbrev-ref", "HEAD").strip()
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no", ":/").strip())
    return {
        "commit": commit,
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch,
        "mlflow.source.git.dirty": str(dirty).lower(),
    }


def libraries() -> dict[str, str]:
    """Versions of what a result may depend on, and the GPU."""
    found = {"version.torch": torch.__version__, "version.cuda": torch.version.cuda or ""}
    for name, packages in (("dali", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")),
                           ("mlflow", ("mlflow",))):  # fmt: skip
        found[f"version.{name}"] = next(filter(None, map(_version, packages)), "")
    if DRIVER.is_file():
        words = DRIVER.read_text().split("\n")[0].split()
        found["version.driver"] = next((w for w in words if w[0].isdigit() and "." in w), "")
    if torch.cuda.is_available():
        found["gpu"] = device_name(torch.device("cuda", torch.cuda.current_device()))
    return {key: value for key, value in found.items() if value}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _program() -> str:
    """What was started: a script, or a module, of which `dan_dist` holds several programs."""
    path, given = Path(sys.argv[0]), sys.orig_argv
    if path.name != "__main__.py":
        return sys.argv[0] or UNKNOWN
    if "-m" not in given:
        return f"-m {path.parent.name}"
    module, *words = given[given.index("-m") + 1 :]
    return " ".join(["-m", module, *words[: module == "dan_dist"]])


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's number without a name
        return UNKNOWN


def _git(*words: str) -> str:
    """What git prints about the checkout of this file; nothing where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
