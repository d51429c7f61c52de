"""tests/README.md names the proof of every claim; each is there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_the_map_names_tests_that_exist() -> None:
    named = re.findall(r"`(\w+\.py)(?:::(\w+))?", (TESTS / "README.md").read_text())
    assert len(named) > 50
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not test or test in functions, f"{file}::{test}"


def test_every_file_of_tests_is_on_the_map() -> None:
    """But those of parts of others."""
    text = (TESTS / "README.md").read_text()
    missing = {path.name for path in TESTS.glob("test_*.py") if path.name not in text}
    assert missing <= {"test_bench.py", "test_environment.py", "test_gpu.py", "test_model.py",
                       "test_ranks.py", "test_state.py", "test_synthetic.py"}, missing  # fmt: skip
