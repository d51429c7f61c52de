"""The architecture: imports point one way, from the story to the on-disk format."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
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


LAUNCHERS = re.compile(
    r"(\w+_)?RANK|(\w+_)?WORLD_SIZE|LOCAL_SIZE|NNODES|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
)
NAMES_LAUNCHERS = {
    "dan_dist/run/environment.py": "reads it, for all others",
    "dan_dist/distributed/world.py": "sets LOCAL_RANK where DeepSpeed, alone, asks for it",
    "launch/benchmarks/peers/table.py": "takes it from the environment of its peers",
    "launch/benchmarks/peers/with_litdata.py": "sets it for LitData, rank by rank",
}


def words_of(path: Path) -> set[str]:
    """The texts and the names of arguments in a file's calls."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return texts | {n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg}


def test_the_launchers_environment_is_read_in_one_place() -> None:
    """By any of the names that torchrun and DeepSpeed's launcher give their workers."""
    read = words_of(REPOSITORY / "dan_dist" / "run" / "environment.py")
    names = {word for word in read if re.fullmatch("[A-Z_]+", word)}
    assert {n for n in names if not LAUNCHERS.fullmatch(n)} == {"HOME", "LOGNAME"}
    found = {
        str(path.relative_to(REPOSITORY))
        for folder in ("dan_dist", "shards", "launch")
        for path in (REPOSITORY / folder).rglob("*.py")
        if any(map(LAUNCHERS.fullmatch, words_of(path)))
    }
    assert found == {*NAMES_LAUNCHERS}


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))


def test_the_story_fits_a_screen() -> None:
    path = REPOSITORY / "dan_dist" / "train.py"
    (run,) = (function for function in functions_of(path) if function.name == "run")
    assert run.end_lineno is not None and run.end_lineno - run.lineno + 1 <= 50


def test_no_function_takes_more_than_a_caller_can_tell_apart() -> None:
    """Eight parameters, beside `self`; a dataclass may have more fields."""
    for path in python_files():
        for function in functions_of(path):
            names = [a.arg for a in (*function.args.posonlyargs, *function.args.args,
                                     *function.args.kwonlyargs)]  # fmt: skip
            count = len(names) - (names[:1] == ["self"])
            assert count <= 8, f"{path}: {function.name} has {count}"


def python_files() -> list[Path]:
    return [p for f in ("dan_dist", "shards", "launch", "slurm", "tests")
            for p in (REPOSITORY / f).rglob("*.py")]  # fmt: skip


def test_no_file_is_longer_than_a_reader_wants() -> None:
    long = {str(p): n for p in python_files() if (n := p.read_text().count("\n")) >= 350}
    assert not long
