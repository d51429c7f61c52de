"""tests/README.md names the proof of every claim, and where faults are decided: all is there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
TEXT = (TESTS / "README.md").read_text()


def test_the_map_names_tests_that_exist() -> None:
    named = re.findall(r"`(\w+\.py)(?:::(\w+))?", TEXT)
    assert len(named) > 50
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not test or test in functions, f"{file}::{test}"


def names_of(path: Path) -> set[str]:
    """What a module defines, as `name` and `module.name`; of classes too, as `Class.name`."""
    found = set[str]()
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        own = {getattr(t, "name", getattr(t, "id", None)) for t in targets} - {None}
        found |= own | {f"{path.stem}.{name}" for name in own}
        if isinstance(node, ast.ClassDef):
            inner = {getattr(n, "name", getattr(getattr(n, "target", None), "id", None))
                     for n in node.body}  # fmt: skip
            found |= {
                f"{start}{node.name}.{name}" for name in inner for start in ("", f"{path.stem}.")
            }
    return found


def test_what_decides_is_where_the_map_says() -> None:
    """Paths from the root or from dan_dist/; functions, methods and keys that are defined."""
    code = [*(REPOSITORY / "dan_dist").rglob("*.py"), *(REPOSITORY / "shards").rglob("*.py")]
    known = set[str]().union(*map(names_of, code))
    shell = "".join(path.read_text() for path in (REPOSITORY / "slurm").glob("*.sh"))
    _, _, table = TEXT.partition("| kind | decided in | test |\n")
    rows = [line.split("|") for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert len(rows) > 40
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row[2]):
            if "/" in name:
                there = any([*root.glob(name)] for root in (REPOSITORY, REPOSITORY / "dan_dist"))
            else:
                there = name in known or f"\n{name}()" in shell
            assert there, f"{row[1].strip()}: {name}"
