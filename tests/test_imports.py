"""The architecture: imports point one way, from the story to the on-disk format."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# A row imports nothing of the rows above it, and nothing of its neighbours in the same row.
DAN_DIST = [
    ["__main__"],
    ["programs"],
    ["dry_run"],
    ["train", "certificate"],
    ["ending"],
    ["build", "monitor", "header", "room", "record"],
    ["pace", "profile"],
    ["inference", "ablation"],
    ["evaluation"],
    ["engine", "tracking"],
    ["model"],
    ["data", "distributed"],
    ["run"],
    ["config", "options"],
    ["keys"],
    ["schema", "redaction"],
    ["data_schema", "reading"],
    ["values"],
]
SHARDS = [
    ["pack"],
    ["demo", "align", "verify"],
    ["leaks"],
    ["show"],
    ["packing"],
    ["releases"],
    ["folders"],
    ["release", "images", "duplicates", "likeness"],
    ["format", "jpeg", "jpeg2000", "kinds", "pixels"],
    ["index", "orientation"],
    ["files", "limits", "command", "cut", "detect"],
]
ROWS = [[f"dan_dist.{n}" for n in row] for row in DAN_DIST]
ROWS += [[f"shards.{n}" for n in row] for row in SHARDS]
ROW_OF = {name: k for k, row in enumerate(ROWS) for name in row}


def wing(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports_of(path: Path) -> set[str]:
    """Wings and modules of ours that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in ("dan_dist", "shards"):
            names = {alias.name for alias in node.names} - {"__version__"}
            found |= {f"{node.module}.{name}" for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {wing(name) for name in found if name.split(".")[0] in ("dan_dist", "shards")}


def files() -> dict[str, list[Path]]:
    """The files of each wing."""
    found: dict[str, list[Path]] = {}
    for package in ("dan_dist", "shards"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if parts[1] != "__init__":
                found.setdefault(".".join(parts[:2]), []).append(path)
    return found


def test_every_wing_has_its_row() -> None:
    assert set(files()) == set(ROW_OF)


@pytest.mark.parametrize("name", ROW_OF)
def test_a_wing_imports_only_rows_below_it(name: str) -> None:
    for path in files()[name]:
        for other in imports_of(path) - {name}:
            assert ROW_OF[other] > ROW_OF[name], f"{path} imports {other}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("shards.format", "torch"),
        ("dan_dist.programs", "torch"),
        ("dan_dist.ablation.grid", "torch"),
        ("dan_dist.data.loader", "torchvision"),
        ("dan_dist.data.loader", "dan_dist.model"),
    ],
)
def test_light_modules_stay_light(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_the_launchers_environment_is_read_in_one_place() -> None:
    for paths in files().values():
        for path in paths:
            if "WORLD_SIZE" in path.read_text() or '"RANK"' in path.read_text():
                assert path.name == "environment.py"


def test_no_file_is_longer_than_a_reader_wants() -> None:
    python = [p for f in ("dan_dist", "shards", "launch", "slurm", "tests")
              for p in (REPOSITORY / f).rglob("*.py")]  # fmt: skip
    long = {str(p): n for p in python if (n := p.read_text().count("\n")) >= 350}
    assert not long
