"""The configuration: its files are found, its keys described, its mistakes named in one line."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY
from dan_dist import config as configuration
from dan_dist import keys
from dan_dist.config import (
    find_config,
    find_output,
    flatten,
    load_config,
    resolve,
    shipped_folder,
    to_yaml,
)

SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"), key=lambda path: path.stem)
SMALLEST = "data: {shards: data/x}\ntrain: {epochs: 1, global_batch: 8, output: runs/x}\n"


def all_keys() -> list[keys.Key]:
    return [key for group in keys.groups() for key in group.keys]


def test_a_new_key_is_a_decision() -> None:
    """Each one has to be understood, kept and tested: raise the number knowingly."""
    assert len(all_keys()) == 92


def test_every_key_is_described() -> None:
    for key in all_keys():
        assert len(key.description) > 5 and not key.description.endswith("."), key
        assert key.kind and "\n" not in key.description
    for group in keys.groups():
        assert group.description.endswith(".") and "\n" not in group.description


# By which names the code has a section, beside its own
SECTIONS = {"": "config", "data.synthetic": "faces", "train": "_options", "engine": "choice"}
WHOLE = ("data.augment.", "data.protocol")  # it goes into the loader whole; it sets other keys


def attributes() -> Iterator[tuple[str, str]]:
    """What the code reads of objects: the last name of the object and its attribute."""
    for path in (REPOSITORY / "dan_dist").rglob("*.py"):
        if path.name not in ("schema.py", "data_schema.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    yield getattr(node.value, "attr", getattr(node.value, "id", "")), node.attr


def test_every_key_is_read_somewhere() -> None:
    """Of its own section, as many sections have a `name` or a `seed`."""
    read = set(attributes())
    for key in all_keys():
        section, _, own = key.name.rpartition(".")
        names = {section.rpartition(".")[2], SECTIONS.get(section, section)}
        is_read = any((name, own) in read for name in names)
        assert is_read or key.name.startswith(WHOLE), key.name


def test_the_description_fits_100_columns_and_names_type_and_default() -> None:
    lines = keys.describe().splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for expected in (
        "heads; 0 is the baseline ResNet-18 [whole number from 0 to 64; default 4]",
        "[adam, adamw or sgd; default adam]", "[whole number ≥ 1; required]",
        "[text or null; default null]", "[true or false; default false]",
        "[number from 0 to 1; default 0.5]",
        "[list of 2 × number from 0.01 to 100; default [1.0, 1.0]]", "[mapping; default {}]",
        "train: The run: its length, its batch, its device, its checkpoints.",
    ):  # fmt: skip
        assert expected in text
    for key in all_keys():
        assert f"  {key.name} " in keys.describe()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid_and_loads_again_as_it_is_written(
    path: Path, tmp_path: Path
) -> None:
    config = load_config(f"configs/{path.name}")
    assert json.dumps(config.model_dump())
    assert config.train.output == f"runs/{path.stem}"
    written = tmp_path / "resolved.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config


def test_what_is_written_is_read_as_the_same_values(tmp_path: Path) -> None:
    """Text that looks like a number, a boolean or nothing; numbers of every size."""
    names = ["1e5", "1e-4", ".5", "yes", "null", "~", "0x1", "1_000", "2020-01-01", "ärger", "a: b"]
    overrides = [f"data.classes={json.dumps(names)}", "optim.lr=1e-30", "optim.weight_decay=1e-5",
                 "data.val_split='1e5'", "engine.deepspeed={a: {b: [1e9, true, 3]}}"]  # fmt: skip
    config = load_config("demo", overrides)
    assert config.data.classes == names and config.optim.lr == 1e-30
    written = tmp_path / "resolved.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config


def test_numbers_in_yaml_are_numbers() -> None:
    assert load_config("demo", ["optim.lr=1e-4"]).optim.lr == 1e-4
    assert load_config("demo", ["optim.lr=5E-3"]).optim.lr == 5e-3
    assert load_config("demo", ["data.val_split=1e5x"]).data.val_split == "1e5x"


@pytest.mark.parametrize("name", ["rafdb", "rafdb.yaml", "configs/rafdb.yaml", "configs/rafdb",
                                  "./configs/rafdb.yaml"])  # fmt: skip
def test_a_recipe_is_found_by_its_name_from_any_folder(name: str) -> None:
    assert find_config(name) == REPOSITORY / "configs" / "rafdb.yaml"


@pytest.mark.parametrize("file", ["rafdb", "rafdb.yaml", "configs/rafdb.yaml"])
def test_a_file_in_the_working_folder_comes_first(tmp_path: Path, file: str) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "demo").mkdir()  # a folder is no configuration
    (tmp_path / file).write_text(SMALLEST)
    assert load_config("rafdb").train.output == "runs/x"
    assert load_config(tmp_path / file).train.output == "runs/x"
    assert load_config("demo").train.output == "runs/demo"


def test_an_installed_package_brings_its_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / "dan_dist" / "configs").mkdir(parents=True)
    (tmp_path / "site" / "configs").mkdir()  # somebody else's
    monkeypatch.setattr(configuration, "PACKAGE", tmp_path / "site" / "dan_dist")
    assert shipped_folder() == tmp_path / "site" / "dan_dist" / "configs"


def test_a_base_that_is_missing_is_named_with_its_reader(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: rafbd\n")
    message = rf"^{tmp_path}/c\.yaml: base is rafbd: no such configuration; did you mean rafdb\?"
    with pytest.raises(FileNotFoundError, match=message):
        load_config(tmp_path / "c.yaml")


def test_the_path_of_a_base_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "lab.yaml").write_text(SMALLEST)
    monkeypatch.setenv("LAB", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in ("$LAB/lab.yaml", "'${LAB}/lab'", "~/shared/lab.yaml"):
        (tmp_path / "c.yaml").write_text(f"base: {written}\n")
        assert load_config(tmp_path / "c.yaml").train.output == "runs/x"
    monkeypatch.delenv("LAB")
    (tmp_path / "c.yaml").write_text("base: $LAB/lab.yaml\n")
    with pytest.raises(ValueError, match=r"c\.yaml: base is '\$LAB/lab\.yaml': \$LAB is not set"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("train:\n  output: runs/e # the first\n  epochs: 3\n  epochs: 4\n", "runs/e"),
        ("model: {backbone: $NO_SUCH/x.pt}\ntrain: {output: 'runs/f', epochs: 2}\n", "runs/f"),
        ("train:\n  output: $HERE/g\ndata:\n  shards: data/x #2\n", "runs/g"),
        ("base: good.yaml\noptim: {lr: 1}\noptim: {lr: 2}\n", "runs/good"),
        ("train:\n  output: runs/h\n  output: runs/i\n", None),
        ("train:\n  output: runs/h #1\n", None),
        ("train:\n  output: $NO_SUCH/h\n", None),
        ("base: wrong.yaml\ntrain: {<<: {output: runs/h}, seed: 1, seed: 2}\n", None),
    ],
)
def test_what_is_wrong_elsewhere_hides_no_folder(
    text: str, folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", "runs")
    Path("good.yaml").write_text("train: {output: runs/good}\n")
    Path("wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.yaml|\$NO_SUCH|stands twice"):
        load_config("wrong.yaml")
    assert find_output(["wrong.yaml"]) == (None if folder is None else Path(folder))


@pytest.mark.parametrize("word", ["optim.lr:1e-4", "optim.lr", "train.epochs 3", "schedule"])
def test_a_key_without_its_value_is_no_recipe(word: str) -> None:
    key = word.replace(":", " ").split()[0]
    with pytest.raises(ValueError, match=f"^{word}: a key, expected {key}=value$"):
        find_config(word)


@pytest.mark.parametrize("name", ["rafbd", "configs/rafbd.yaml", "RAFDB"])
def test_an_unknown_recipe_lists_those_there_are(name: str) -> None:
    known = ", ".join(path.stem for path in SHIPPED)
    message = rf"^{name}: no such configuration; did you mean rafdb\? There are {known}$"
    with pytest.raises(FileNotFoundError, match=message):
        find_config(name)
    with pytest.raises(FileNotFoundError, match=r"no such configuration; there are affectnet7, "):
        find_config("zzz")
    for elsewhere in ("runs/rafdb.yaml", "/rafdb.yaml", "", "."):  # not the shipped one in silence
        with pytest.raises(FileNotFoundError, match="no such configuration"):
            find_config(elsewhere)


WRONG: dict[str, str] = {
    "train.epoch=3": "unknown key 'train.epoch'; did you mean 'train.epochs'?",
    "modell.heads=3": "unknown key 'modell'; did you mean 'model'?",
    "lr=0.1": "unknown key 'lr'; did you mean 'optim.lr'?",
    "epochs=3": "unknown key 'epochs'; did you mean 'train.epochs'?",
    "train.lr=0.1": "unknown key 'train.lr'; did you mean 'optim.lr'?",
    "model.epochs=3": "unknown key 'model.epochs'; did you mean 'train.epochs'?",
    "network.heads=3": "unknown key 'network.heads'; did you mean 'model.heads'?",
    "flip_p=0": "unknown key 'flip_p'; did you mean 'data.augment.flip_p'?",
    "data.flip_p=0": "unknown key 'data.flip_p'; did you mean 'data.augment.flip_p'?",
    "augment.flip_p=0": "unknown key 'augment'; did you mean 'data.augment'?",
    "epoch=3": "unknown key 'epoch'; did you mean 'train.epochs'?",
    "name=sgd": "did you mean 'optim.name' or 'schedule.name' or 'engine.name'?",
    "loss.lambda_affinity=2": "unknown key 'loss.lambda_affinity'; it is 'loss.lambda_fcn' now",
    "loss.lambda_partition=2": "unknown key 'loss.lambda_partition'; it is 'loss.lambda_afn' now",
    "schedule.zzz=1": "unknown key 'schedule.zzz'; known are name, gamma, every",
    "train.epochs=many": "train.epochs is 'many': input should be a valid integer",
    "train.epochs=null": "train.epochs is 'null': input should be a valid integer",
    "optim.lr=.inf": "optim.lr is inf: input should be a finite number",
    "optim={lr: [}": "optim={lr: [}: not YAML: ",
    "epochs": "override 'epochs': expected section.key=value",
    "=3": "override '=3': expected section.key=value",
    "model.image_size=50": "model.image_size is 50: input should be a multiple of 32",
    "data.sampling=even": "data.sampling is 'even', expected balanced, shuffle, {power: 0 to 10}",
    "data.sampling={power: -1}": "data.sampling is {'power': -1}, expected balanced, ",
    "data.sampling={effective: 1}": "{effective: 0 or more, below 1}",
    "data.sampling={shares: {happy: 0}}": "{shares: {class: 0 or more, …}}",
    "data.sampling={from: shuffle, to: even, epochs: 1}": "{from: …, to: …, epochs: 1 to 2048}",
    "data.shards=[{path: a, shares: 2}]": "data.shards: {'path': 'a', 'shares': '2'}, expected {",
    "data.shards=[]": "data.shards is an empty list, expected at least one set",
    "schedule.every=2": "schedule.every: only schedule.name=step takes it",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_named_in_one_line(override: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config("demo", [override])
    assert WRONG[override] in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_key_in_a_file_names_the_file_and_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    gone = "loss: {lambda_affinity: 1.0}"
    for text, message in (
        (SMALLEST.replace("epochs", "epoch"), "unknown key 'train.epoch'; did you mean 'train.e"),
        (SMALLEST + gone, "unknown key 'loss.lambda_affinity'; it is 'loss.lambda_fcn' now"),
        (SMALLEST.replace("epochs: 1, ", ""), "'train.epochs' is missing"),
        ("[1, 2]", "expected sections of keys, found ['1', '2']"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: {message}")


def test_a_stored_configuration_of_an_earlier_version_is_understood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Old names, keys that have gone, keys that were not there yet."""
    now = load_config("demo", ["loss.lambda_fcn=2.0", "loss.lambda_afn=3.0"]).model_dump()
    old = json.loads(json.dumps(now))
    old["loss"]["lambda_affinity"] = old["loss"].pop("lambda_fcn")
    old["loss"]["lambda_partition"] = old["loss"].pop("lambda_afn")
    del old["task"], old["train"]["max_skipped_steps"], old["data"]["synthetic"]["by"]
    assert resolve(old) == flatten(now)
    old["train"]["turbo"] = old["verbose"] = True
    with pytest.raises(ValueError, match=r"^unknown key '(train\.turbo|verbose)'"):
        resolve(old)
    monkeypatch.setattr(configuration, "GONE", ("train.turbo", "verbose", "audio.rate"))
    monkeypatch.setattr(keys, "GONE", configuration.GONE)
    before = json.dumps(old)
    assert resolve(old) == flatten(now) and json.dumps(old) == before
    with pytest.raises(ValueError, match=r"unknown key 'train\.turbo'; it has gone"):
        load_config("demo", ["train.turbo=true"])


def test_renamed_and_gone_keys_are_none_of_today() -> None:
    today = keys.names()
    assert not set(today) & {*keys.RENAMED, *keys.GONE}
    assert set(keys.RENAMED.values()) <= set(today)
