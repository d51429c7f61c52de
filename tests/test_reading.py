"""One rule for every key: its text is read as what it takes, in a file as on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from dan_dist.config import LARGEST, Config, find_output, load_config, to_yaml

BASE = "data: {shards: data/x}\ntrain: {epochs: 1, global_batch: 8, output: runs/x}\n"
UNUSUAL = ["1e3", "0x10", "on", "No", "007", "1_000", "2020-01-01", "1:30", "null", "none", "NaN",
           "0o7", "a: b", "x,y", "C#", "-", "=", "<<", "ärger", "1.", "$5", "~"]  # fmt: skip


def value(config: Config, name: str) -> Any:
    found: Any = config.model_dump()
    for part in name.split("."):
        found = found[part]
    return found


def both(tmp_path: Path, key: str, text: str) -> tuple[Any, Any]:
    """What the command line and a file make of a key's text."""
    *sections, own = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
    path = tmp_path / "own.yaml"
    base = "\n".join(line for line in BASE.splitlines() if not line.startswith(sections[0]))
    path.write_text("\n".join([base, *lines, f"{'  ' * len(sections)}{own}: {text}"]))
    return value(load_config("demo", [f"{key}={text}"]), key), value(load_config(path), key)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        *(("optim.clip_norm", word, None) for word in ("null", "none", "None", "NONE", "~")),
        *(("model.weights_classes", word, None) for word in ("Null", "none", "~")),
        *(("loss.fcn", word, "none") for word in ("null", "None", "~", "none")),
        *(("model.backbone", word, "none") for word in ("~", "NULL", "none")),
        *(("optim.nesterov", word, False) for word in ("no", "Off", "FALSE", "false")),
        *(("tracking.enabled", word, True) for word in ("yes", "ON", "True")),
        *(("tracking.experiment", word, word) for word in ("007", "on", "1e3", "2020-01-01")),
        ("tracking.run_name", "1:30", "1:30"), ("tracking.run_name", "'none'", "none"),
        ("tracking.run_name", '"007"', "007"), ("tracking.run_name", "C#", "C#"),
        ("model.weights", "$HOME/a b.pt", "/home/me/a b.pt"),
        ("model.weights", "~/a.pt", "/home/me/a.pt"), ("model.weights", "'~'", "/home/me"),
        ("model.weights", '"${HOME}/$$x"', "/home/me/$x"),
        ("tracking.run_name", "$HOME", "$HOME"), ("tracking.tags", "{a: ~}", {"a": "~"}),
        ("tracking.tags", "{1: 010, null: on}", {"1": "010", "null": "on"}),
        ("optim.lr", "1e-4", 1e-4), ("optim.lr", "5E-3", 5e-3), ("optim.lr", "1", 1.0),
        ("optim.lr", ".5", 0.5), ("optim.lr", "+5.", 5.0), ("optim.lr", "\u00a01e-4", 1e-4),
        ("schedule.every", "+1", 1),
        ("engine.deepspeed", "{a: [none, 1e9, null, true]}", {"a": ["none", 1e9, None, True]}),
    ],
)  # fmt: skip
def test_a_text_is_read_alike_on_the_command_line_and_in_a_file(
    key: str, text: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert both(tmp_path, key, text) == (expected, expected)


REFUSED = {
    ("schedule.every", "010"): "schedule.every is '010': input should be a valid integer; "
    "write 10, or 8 where it is octal",
    ("schedule.every", "0x10"): "; write 16",
    ("schedule.every", "1_000"): "; write 1000",
    ("schedule.every", "1e3"): "; write 1000",
    ("schedule.every", "1:30"): "; write 90",
    ("schedule.every", "'5'"): "; write it without quotes",
    ("optim.lr", "0b11"): "; write 3",
    ("optim.lr", "007.5"): "; write 7.5",
    ("optim.lr", "nan"): "optim.lr is nan: input should be a finite number",
    ("optim.lr", "1e999"): "finite number",
    ("optim.nesterov", "1"): "; write true",
    ("optim.nesterov", "null"): "optim.nesterov is 'null': input should be a valid boolean",
    ("train.compile", "maybe"): "train.compile is 'maybe': expected auto or true or false",
    ("data.classes", "happy"): "; write [happy]",
    ("data.cache", "$NOWHERE/x"): "$NOWHERE is not set in the environment; set it, or write $$",
    ("data.cache", "$EMPTY/x"): "$EMPTY is not set",
    ("train.output", "None"): "train.output is none, a word for null, which it does not take",
    ("data.shards", "~"): "write ./~ for a folder of that name",
    ("data.cache", "a$"): "data.cache is 'a$': a $ without a variable's name; write $$",
    ("data.shards", "[{path: ~nobody-here/x}]"): "write ./~nobody-here for a folder of that name",
    ("engine.deepspeed", "{a: yes}"): "engine.deepspeed.a is yes, which versions of YAML read in",
    ("engine.deepspeed.a", "0x1"): "write '\"0x1\"' for the text, or a decimal number",
    ("train.epochs", "1٠"): "train.epochs is '1٠': input should be a valid integer",
    ("optim.lr", "1e−4"): "input should be a valid number",
    ("train.seed", "1e400"): "train.seed is '1e400': input should be a valid integer",
    ("data.classes", "(a,b)"): "; write [a,b]",
    ("data.synthetic", "no"): "; write null",
    ("optim.clip_norm", "off"): "; write null",
    ("optim.lr", ""): "optim.lr has no value; write null, or '\"\"' for no text",
    ("data.classes", "[!!python/name:os.system a]"): "has the tag 'tag:yaml.org,2002:python/name",
    ("data.classes", "[a] # b"): "' # b' stands behind the value",
    ("optim", "{lr: 1, lr: 2}"): "'lr' stands twice",
    ("model.image_size", "9" * 5000): "…: input should be a valid integer",
    ("tracking.run_name", "'a' b"): "not YAML",
}  # fmt: skip


@pytest.mark.parametrize(("key", "text"), REFUSED)
def test_what_means_something_else_is_refused_with_the_way_to_write_it(
    key: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ValueError) as caught:
        load_config("demo", [f"{key}={text}"])
    line = str(caught.value)
    assert REFUSED[key, text] in line and "\n" not in line and len(line.split(": ", 2)[-1]) < 300


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optim.lr=1", "optim.lr=2"], "optim.lr=2 replaces optim.lr=1"),
        (["optim={lr: 1}", "optim.lr=2"], "optim.lr=2 replaces optim={lr: 1}"),
        (["optim.lr=1", "optim={lr: 2}"], "optim={lr: 2} replaces optim.lr=1"),
        (["optim.lr=1", "optim.lr=3", "optim.lr=2"], "optim.lr=2 replaces optim.lr=3"),
    ],
)
def test_of_two_on_the_command_line_the_later_replaces_the_former_and_the_log_names_both(
    words: list[str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "dan_dist"):
        assert load_config("demo", words).optim.lr == 2
        assert line in caplog.messages
        caplog.clear()
        load_config("demo", ["optim.lr=1", "optim.name=sgd", "optim.lr=1"])
    assert not caplog.messages


def test_a_section_in_braces_gives_the_keys_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(BASE + "optim: {name: sgd, lr: 0.1, momentum: 0.5}\n")
    config = load_config(path, ["optim={lr: 0.2}", "tracking.tags.mlflow.note.content=on #3"])
    assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 0.2, 0.5)
    assert config.tracking.tags == {"mlflow.note.content": "on #3"}


@pytest.mark.parametrize("text", ["runs/fold #1", "a: b", " a ", "[x] y", "{", "*a", "!b", "&c"])
def test_text_is_taken_whole_from_the_command_line(text: str) -> None:
    assert load_config("demo", [f"train.output={text}"]).train.output == text


FILES = {
    "optim: {lr: 1}\n# tried in May\noptim: {lr: 2}": "line 5: 'optim' stands twice, in line 3 too",
    "tracking: {tags: {a: x, 'a': y}}": "'a' stands twice",
    "data: {}": "'data' stands twice, in line 1 too; write it once",
    "tracking:\n  run_name: fold #1": "is '#1' a comment, or part of the value? Write 'fold #1' in",
    "optim:\n\tlr: 1": "write spaces, not tabs",
    "optim:\n  lr:\t1": "write spaces, not tabs",
    "optim: &a {lr: 1}\nschedule: &a {gamma: 1}": "found duplicate anchor 'a'",
    "optim: {lr: 0o17}": "optim.lr is '0o17': input should be a valid number",
    "optim: {lr: 1e-4#1}": "optim.lr is '1e-4#1': input should be a valid number",
    "optim:\n  lr:1": "optim is 'lr:1'",
    "tracking: {tags: {'1': a, 1: b}}": "'1' stands twice",
    "optim:": "optim has no value",
    "optim.lr: 1": "unknown key 'optim.lr'; write it below its section, optim: {lr: …}",
    "tracking: {tags: {a: !!python/object/apply:os.system [ls]}}": "has the tag",
    "? [a]\n: b": "a key is not a text",
    "tracking: {tags: &t [*t]}": "nested too deeply",
    "x: " + "[" * 1100: "nested too deeply",
    "---\na: 1": "expected a single document",
    "a: &a [" + "x," * 99 + "]\nb: &b [" + "*a," * 99 + "]\nc: [" + "*b," * 99 + "]": "50,000 v",
}  # fmt: skip


@pytest.mark.parametrize("text", FILES, ids=[text[:24] for text in FILES])
def test_a_file_that_means_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(BASE + text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and FILES[text] in line and "\n" not in line


def test_what_yaml_gives_is_taken(tmp_path: Path) -> None:
    """A byte-order mark, anchors, merge keys, comments after a space, texts over several lines."""
    path = tmp_path / "own.yaml"
    path.write_text(
        "\ufeff" + BASE + "optim: &o {name: sgd, lr: 0.1}  # as in the paper\n"
        "tracking:\n  run_name: fold # one\n  experiment: >-\n    a\n    b\n"
        "  tags: {<<: &t {a: 1, b: 2}, b: 3}\nschedule: {gamma: 0.5}\n"
    )
    config = load_config(path)
    assert config.optim.lr == 0.1 and config.tracking.tags == {"a": "1", "b": "3"}
    assert (config.tracking.run_name, config.tracking.experiment) == ("fold", "a b")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\x00\x01\xfe\xff", "not text in UTF-8"), (BASE.encode("utf-16"), "not text in UTF-8"),
        (b"tags: \xe4", "not text in UTF-8 (unexpected end of data, byte 6)"),
        (b"#" * (LARGEST + 1), f"{LARGEST + 1:,} bytes, a configuration has {LARGEST:,} at most"),
        (b"a: \x01", "not YAML"), (b"", "expected sections of keys, found None"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(content: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {line}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("escape", ["UFFFFFFFF", "U00110000"])
def test_an_escape_that_is_no_character_is_refused(escape: str, tmp_path: Path) -> None:
    word = f'tracking.run_name="\\{escape}"'
    with pytest.raises(ValueError, match=r"tracking\.run_name.*: not YAML: "):
        load_config("demo", [word])
    assert find_output([f'train.output="\\{escape}"']) is None
    (tmp_path / "x.yaml").write_text(f'train: {{output: "\\{escape}"}}\n')
    with pytest.raises(ValueError, match=r"x\.yaml: not YAML: "):
        load_config(tmp_path / "x.yaml")


def test_the_folder_of_a_training_is_that_of_the_last_word() -> None:
    """To which a refused command leaves its reason: no other run's."""
    words = ["affectnet8", "train={output: b, epochs: abc}"]
    assert find_output(words) == Path("b")
    assert find_output(["train.output=a", "train={output: b}"]) == Path("b")
    assert find_output(["train={output: b}", "train.output=a"]) == Path("a")
    assert find_output(["affectnet8", "train={epochs: 3}"]) == Path("runs/affectnet8")


def test_a_folder_or_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="no such configuration: a folder, expected a YAML file"
    ):
        load_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a file, expected a YAML file"):
        load_config("/dev/null")


def test_what_is_written_is_read_as_the_same(tmp_path: Path) -> None:
    """Names that look like something else, in every place for text, and paths with a dollar."""
    tags = {name: name for name in UNUSUAL}
    words = [f"data.classes={json.dumps(UNUSUAL)}", f"tracking.tags={json.dumps(tags)}",
             "tracking.run_name='none'", "train.output=runs/$$a #1", "data.cache=$$",
             'data.shards=[{path: "a$$", classes: {1: 007, on: "none"}}]',
             "data.sampling={shares: {007: 2, none: 1e-7}}", "optim.lr=1e-30",
             "engine.deepspeed={a: ['yes', '1e5', 1e5, none, '~', null]}"]  # fmt: skip
    config = load_config("demo", words)
    assert config.data.classes == UNUSUAL and config.tracking.tags == tags
    assert config.train.output == "runs/$a #1" and config.data.cache == "$"
    assert config.data.shards == [{"path": "a$", "classes": {"1": "007", "on": "none"}}]
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
