"""The programs' command lines: read and checked before anything heavy is imported."""

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from conftest import REPOSITORY
from dan_dist import options, programs
from dan_dist.ablation.runs import _run as run_ablation
from dan_dist.options import argument, option
from dan_dist.programs import TrainCommand, read_train_command
from dan_dist.run import cli
from dan_dist.run.signals import StopRequest

TRAIN = str(REPOSITORY / "launch" / "train.py")
HEAVY = ("torch", "torchvision", "nvidia", "mlflow", "matplotlib", "deepspeed")


def imported(process: subprocess.CompletedProcess[str]) -> set[str]:
    """The packages that a process started with -X importtime has imported."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train", ["train.epoch=3"], "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("train", ["--epochs", "3"], "unknown option --epochs; keys are no options, type train.ep"),
        ("ablate", ["heads", "--config", "rafbd"], "rafbd: no such configuration; did you mean ra"),
        (
            "certify",
            ["demo", "--steps", "9", "optim.rl=1"],
            "key 'optim.rl'; did you mean 'optim.lr'?",
        ),
        ("certify", ["serw", "--worlds", "2"], "serw: no such configuration; did you mean"),
        ("ablate", ["heads", "modell.heads=3"], "unknown key 'modell'; did you mean 'model'?"),
    ],
)
def test_a_mistake_ends_in_one_line_before_torch_is_imported(
    tmp_path: Path, program: str, arguments: list[str], message: str
) -> None:
    script = REPOSITORY / "launch" / f"{program}.py"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, *arguments],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    (line,) = [x for x in done.stderr.splitlines() if not x.startswith("import time:")]
    assert line.startswith("error: ") and message in line
    assert "pydantic" in imported(done) and not imported(done) & set(HEAVY)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    refused = program == "train" and "--epochs" not in arguments  # whose folder can be read
    assert left == ([tmp_path / "runs" / "demo" / "outcome.json"] if refused else [])


def test_help_lists_every_key_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", TRAIN, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not imported(done) & set(HEAVY)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line.startswith("  train.")][:2] == [
        "train.epochs", "train.global_batch",
    ]  # fmt: skip
    assert (
        "affectnet7, affectnet7-heldout, affectnet8, affectnet8-heldout, affectnet8-large, demo, "
        "demo-backbone, fer2013, fer2013-64, ferplus, msceleb, rafdb, rafdb-heldout, sfew, "
        "sfew-heldout."
    ) in " ".join(lines)
    for name in programs.OPTIONS[:-1]:
        assert any(line.startswith(f"  {name} ") for line in lines)


READ: dict[str, TrainCommand] = {
    "": TrainCommand("demo", []),
    "rafdb": TrainCommand("rafdb", []),
    "configs/rafdb.yaml optim.lr=1": TrainCommand("configs/rafdb.yaml", ["optim.lr=1"]),
    "optim.lr=1 rafdb": TrainCommand("rafdb", ["optim.lr=1"]),
    "--config rafdb train.epochs=3": TrainCommand("rafdb", ["train.epochs=3"]),
    "--config=rafdb": TrainCommand("rafdb", []),
    "rafdb --dry-run": TrainCommand("rafdb", [], dry_run=True),
    "--dry-run --ranks 8 a=b=c": TrainCommand("demo", ["a=b=c"], dry_run=True, ranks=8),
    "--ranks=8 --dry-run": TrainCommand("demo", [], dry_run=True, ranks=8),
    "rafdb a=1 -h": TrainCommand("", ["a=1"], help=True),
}


@pytest.mark.parametrize("line", READ)
def test_a_training_s_command_line(line: str) -> None:
    assert read_train_command(line.split()) == READ[line]


def test_deepspeed_s_launcher_chooses_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSS_RANK", "0")
    assert read_train_command([]).overrides == ["engine.name=deepspeed"]
    assert read_train_command(["engine.name=ddp"]).overrides == ["engine.name=ddp"]


REFUSED = {
    "--epochs 3": "unknown option --epochs; keys are no options, type train.epochs=3",
    "--lr=0.1": "unknown option --lr; keys are no options, type optim.lr=0.1",
    "--train.epochs 3": "unknown option --train.epochs; keys are no options, type train.epochs=3",
    "--global-batch 4": "keys are no options, type train.global_batch=4",
    "--compile": "keys are no options, type train.compile=…",
    "--epochs train.seed=1": "keys are no options, type train.epochs=…",
    "--seed 3": "type data.synthetic.seed=3 or train.seed=3",
    "--dryrun": "unknown option --dryrun; did you mean --dry-run?",
    "--dry-run=true": "--dry-run takes no value",
    "--zzz": "unknown option --zzz; --help lists the options and the keys",
    "--ranks 3": "--ranks: only --dry-run takes it; torchrun starts a training's ranks",
    "--dry-run --ranks no": "--ranks is 'no', expected 1 or more",
    "--dry-run --ranks 0": "--ranks is '0', expected 1 or more",
    "--dry-run --ranks": "--ranks is '', expected 1 or more",
    "--config": "--config: expected a configuration",
    "rafdb sfew": "'sfew': the configuration is rafdb already, expected section.key=value",
    "rafdb epochs 3": "'epochs': the configuration is rafdb already, expected section.key=value",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_training_s_wrong_command_line(line: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_train_command(line.split())
    assert REFUSED[line] in str(caught.value) and "\n" not in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A program: sample.py THING [FILE…]

    What it does.
    """

    thing: Path = argument("what is worked on")
    files: tuple[Path, ...] = argument("files", default=())
    data: str = option("where the data lie")
    kind: Literal["a", "b"] = option("which one", "a")
    rank_count: int | None = option("how many (default: all)", None)
    fast: bool = option("hurry", False)


def test_a_parser_is_made_from_the_fields() -> None:
    assert cli.parse(Sample, ["x", "--data", "y"]) == Sample(thing=Path("x"), data="y")
    line = "--fast x --rank-count 3 a.jpg b.jpg --kind=b --data y"  # options stand anywhere
    assert cli.parse(Sample, line.split()) == Sample(
        thing=Path("x"), files=(Path("a.jpg"), Path("b.jpg")), data="y", kind="b", rank_count=3,
        fast=True,
    )  # fmt: skip
    words = cli.parse(options.PredictOptions, ["run", "a.jpg", "--json", "b.jpg"])
    assert words.images == (Path("a.jpg"), Path("b.jpg")) and words.json is True


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--data y", "the following arguments are required: thing"),
        ("x", "the following arguments are required: --data"),
        ("x --data y --kind c", "argument --kind: invalid choice: 'c' (choose from"),
        ("x --data y --rank-count many", "argument --rank-count: invalid int value: 'many'"),
        ("x --data y --ran 3", "unrecognized arguments: --ran"),  # no abbreviations
        ("x --data y --kind=https://ann:pw@h/b?sig=1", "invalid choice: 'https://***@h/b?sig=***'"),
        ("x --data y --fast=1", "argument --fast: ignored explicit argument '1'"),
    ],
)
def test_a_bad_command_line_ends_with_code_2(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(Sample, line.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):  # a tuple without a default wants one at least
        cli.parse(options.PredictOptions, ["run"])


def test_a_parser_s_help_has_texts_defaults_and_the_docstring(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(Sample, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "A program: sample.py THING [FILE…] What it does.", "thing what is worked on",
        "--data DATA where the data lie --kind", "--kind {a,b} which one (default: a)",
        "--rank-count RANK_COUNT how many (default: all) --fast", "--fast hurry",
    ):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize(
    "name",
    [
        "EvaluateCommand",
        "PredictOptions",
        "ExplainOptions",
        "ExportOptions",
        "AblateOptions",
        "CertifyOptions",
    ],
)
def test_every_option_of_a_program_is_described(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = getattr(options, name)
    assert all(field.metadata["help"] for field in fields(kind))
    with pytest.raises(SystemExit):
        cli.parse(kind, ["--help"])
    shown = capsys.readouterr().out
    for field in fields(kind):
        own = field.name if "positional" in field.metadata else f"--{field.name.replace('_', '-')}"
        assert own in shown


def module(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_python_m_dan_dist_names_the_programs() -> None:
    for words in (["dan_dist"], ["dan_dist", "play"]):
        done = module(*words)
        programs = "train,evaluate,predict,explain,export,ablate,certify"
        expected = f"usage: python -m dan_dist {{{programs}}} …"
        assert done.returncode == 1 and done.stderr.strip() == expected
    done = module("dan_dist", "train", "train.epoch=3")
    assert done.returncode == 2 and "did you mean 'train.epochs'" in done.stderr


@pytest.mark.slow
def test_python_m_dan_dist_train_names_what_to_type() -> None:
    done = module("dan_dist.train")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip() == ("type: python -m dan_dist train [CONFIG] [section.key=value …]")


SCRIPTS = sorted(p.stem for p in (REPOSITORY / "launch").glob("*.py") if p.stem != "bench")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_clone_s_scripts_run_its_own_code(script: str, tmp_path: Path) -> None:
    """Another one is in the working folder, on PYTHONPATH, and where packages are installed."""
    for package in ("dan_dist", "shards"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('another one')\n")
    path = str(REPOSITORY / "launch" / f"{script}.py")
    code = f"""
import atexit, runpy, site, sys
site.addsitedir({str(tmp_path)!r})
atexit.register(lambda: print(sys.modules["dan_dist"].__file__))
runpy.run_path({path!r}, run_name="__main__")
"""
    for command in ([path, "--help"], ["-c", code, "--help"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and "launch/" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == str(REPOSITORY / "dan_dist" / "__init__.py")


def test_an_ablation_s_trainings_run_the_same_code(tmp_path: Path) -> None:
    """Another one in the working folder, where `python -m` looks first, is left alone."""
    (tmp_path / "dan_dist").mkdir()
    (tmp_path / "dan_dist" / "__main__.py").write_text("raise SystemExit(7)\n")
    assert run_ablation([sys.executable, "-m", "dan_dist", "train", "a=b"], StopRequest()) == 2


def test_launch_has_a_script_for_each_program() -> None:
    from dan_dist.__main__ import PROGRAMS

    assert sorted(PROGRAMS) == SCRIPTS
    for name in PROGRAMS:
        text = (REPOSITORY / "launch" / f"{name}.py").read_text()
        assert f"from dan_dist.programs import {name}\n" in text and callable(
            getattr(programs, name)
        )
