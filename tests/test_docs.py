"""The READMEs: their links lead somewhere, and what they name exists."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from test_imports import DAN_DIST

from dan_dist import keys

REPOSITORY = Path(__file__).resolve().parent.parent
FRONT = REPOSITORY / "README.md"
READMES = [FRONT, *sorted(REPOSITORY.glob("*/README.md"))]
NAMES = [str(path.relative_to(REPOSITORY)) for path in READMES]
LARGEST_FRONT = 12_288  # bytes
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # language, text


def anchors(path: Path) -> set[str]:
    """The names under which a page's headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def code(path: Path) -> str:
    """The text of all code blocks and of all `code` in lines."""
    text = path.read_text()
    blocks = [block for _, block in FENCED.findall(text)]
    return "\n".join([*blocks, *re.findall(r"`([^`]+)`", FENCED.sub("", text))])


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", path.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(page), (
            f"{target}: {name or path} has no such heading"
        )


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_files_and_modules_of_commands_exist(path: Path) -> None:
    text = code(path)
    for name in re.findall(r"(?<![\w./-])(?:launch|slurm|configs|tests)/\w[\w-]*\.\w+", text):
        assert (REPOSITORY / name).is_file(), f"{name} is not there"
    for name in re.findall(r"launch/train\.py ([a-z][\w-]*)(?![\w.=-])", text):
        assert (REPOSITORY / "configs" / f"{name}.yaml").is_file(), f"there is no recipe {name}"
    for name in re.findall(r"python -m ((?:shards|dan_dist)[\w.]*)", text):
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"there is no module {name}"
        assert spec.submodule_search_locations is None or importlib.util.find_spec(
            f"{name}.__main__"
        ), f"{name} cannot be run"


def defined(path: Path) -> set[str]:
    """The functions, classes, methods and constants of a Python file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_named_functions_are_in_the_named_file(path: Path) -> None:
    """`file.py` (`name`, `Class.method`) and, of a module of dan_dist, `module.name`."""
    text, wing = FENCED.sub("", path.read_text()), REPOSITORY / "dan_dist"
    named = [
        (file, name)
        for file, names in re.findall(r"`([\w/]+\.py)` \((`[^()]+`)\)", text)
        for name in re.findall(r"`([\w.]+)`", names)
    ]
    modules = {module.stem for module in wing.glob("*.py")} - {"config"}  # a checkpoint's part
    known = keys.names()
    for module, name in re.findall(r"`([a-z_]+)\.(\w+)`", text):
        if module in modules and name != "py" and f"{module}.{name}" not in known:
            named.append((f"{module}.py", name))
    for file, name in named:
        places = [root / file for root in (REPOSITORY, wing, path.parent)]
        source = next((place for place in places if place.is_file()), None)
        assert source, f"{file} is not there"
        assert set(name.split(".")) <= defined(source), f"{file} has no {name}"


def test_the_architectures_rows_are_those_of_the_imports() -> None:
    text = (REPOSITORY / "dan_dist" / "README.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    found = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    assert found == [set(row) for row in DAN_DIST if row != ["__main__"]]


def test_every_picture_is_shown() -> None:
    shown = "".join(path.read_text() for path in READMES)
    for picture in REPOSITORY.rglob("*.png"):
        if not {"data", "runs", "mlruns"} & set(picture.relative_to(REPOSITORY).parts):
            assert picture.parent.name == "pictures" and f"pictures/{picture.name})" in shown


def test_the_front_page_is_short() -> None:
    assert FRONT.stat().st_size <= LARGEST_FRONT


def test_the_front_page_names_every_folder() -> None:
    tree = next(text for language, text in FENCED.findall(FRONT.read_text()) if not language)
    named, top = set(), ""
    for line in tree.splitlines():
        if found := re.match(r"( *)(\w+)/ +\S", line):
            top = top if found[1] else found[2]
            named.add(f"{top}/{found[2]}" if found[1] else top)
    folders = {path.parent.relative_to(REPOSITORY) for path in REPOSITORY.glob("*/*/__init__.py")}
    wings = {str(folder) for folder in folders if folder.parts[0] in ("dan_dist", "shards")}
    assert wings and named == wings | {
        "configs", "dan_dist", "launch", "shards", "slurm", "tests"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "pattern"), [("configs", "*.yaml"), ("launch", "*.py"), ("slurm", "*.sh")]
)
def test_a_folders_readme_names_its_files(folder: str, pattern: str) -> None:
    text = (REPOSITORY / folder / "README.md").read_text()
    files = sorted((REPOSITORY / folder).glob(pattern))
    assert files and not [path.name for path in files if f"`{path.name}`" not in text]


def test_the_table_of_keys_is_the_schemas() -> None:
    """`python -m dan_dist.keys` prints it anew."""
    assert keys.table() in (REPOSITORY / "configs" / "README.md").read_text()
