"""The programs: `launch/*.py`, `dan-*` and `python -m dan_dist` call these; each ends its process.

Nothing heavy is imported before a program's command line has been read.
"""

import difflib
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from dan_dist.run import cli
from dan_dist.run.environment import has_launcher, is_deepspeed_launched, read_launch
from dan_dist.run.signals import PREEMPTED, StopRequest
from shards.command import FAILED, words

if TYPE_CHECKING:
    from dan_dist.config import Config

MOST_RUNS = 1000  # seeds of a setting; ranks of a run on one machine
OPTIONS = ("--config", "--dry-run", "--ranks", "--help")

TRAIN = """Trains DAN: torchrun launch/train.py [CONFIG] [section.key=value …]

CONFIG is a YAML file, or the name of a shipped one:
{shipped}
Without it: demo, which draws its own faces. `python launch/train.py` is world size 1. SIGTERM,
SIGUSR1 or Ctrl-C end the run after a checkpoint; the same command resumes.

  --config CONFIG  the same as CONFIG
  --dry-run        checks all that needs no training, and prints the resolved configuration
  --ranks N        with --dry-run: checks a training on N ranks, which may be another machine's

The keys, each as key [values; default]:

{keys}"""


def train() -> NoReturn:
    """Trains on this rank."""
    cli.run(_train)


def evaluate() -> NoReturn:
    """Evaluates a checkpoint on this rank."""
    cli.run(_evaluate)


def predict() -> NoReturn:
    """Predicts what faces express; code 1 where an image could not be read."""
    cli.run(_predict)


def explain() -> NoReturn:
    """Looks inside a network; code 1 where an image could not be read."""
    cli.run(_explain)


def export() -> NoReturn:
    """Exports a network."""
    cli.run(_export)


def ablate() -> NoReturn:
    """Trains a grid of settings and compares them."""
    cli.run(_ablate)


def certify() -> NoReturn:
    """Certifies a training's data; code 1 where a part of it is not equal."""
    cli.run(_certify)


class TrainCommand(NamedTuple):
    """The command line of a training."""

    config: str
    overrides: list[str]
    dry_run: bool = False
    ranks: int | None = None  # of a dry run
    help: bool = False


def read_train_command(arguments: Sequence[str]) -> TrainCommand:
    """The parts of a command line; keys are not looked at yet.

    Raises:
        ValueError: an unknown option, with the key that may be meant; a second configuration.
    """
    configs: list[str] = []
    found = TrainCommand("", [])
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--config", "--ranks") and not equals:
            value = next(words, "")
        if word in ("-h", "--help"):
            return found._replace(help=True)
        elif word == "--dry-run":
            found = found._replace(dry_run=True)
        elif option == "--ranks":
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"--ranks is {value!r}, expected 1 or more")
            found = found._replace(ranks=int(value))
        elif option == "--config":
            if not value:
                raise ValueError("--config: expected a configuration")
            configs.append(value)
        elif word.startswith("-"):
            raise ValueError(_unknown_option(option, value or next(words, "")))
        elif equals:
            found.overrides.append(word)
        else:
            configs.append(word)
    if len(configs) > 1:
        raise ValueError(
            f"'{configs[1]}': the configuration is {configs[0]} already, expected section.key=value"
        )
    if found.ranks and not found.dry_run:
        raise ValueError("--ranks: only --dry-run takes it; torchrun starts a training's ranks")
    if is_deepspeed_launched() and not any(o.startswith("engine.name=") for o in found.overrides):
        found.overrides.append("engine.name=deepspeed")
    return found._replace(config=configs[0] if configs else "demo")


def _unknown_option(option: str, value: str) -> str:
    from dan_dist.keys import candidates, names

    name = option.lstrip("-").replace("-", "_")
    if option in OPTIONS:
        return f"{option} takes no value"
    if near := difflib.get_close_matches(option, OPTIONS, 1, cutoff=0.8):
        return f"unknown option {option}; did you mean {near[0]}?"
    value = "…" if not value or "=" in value or value.startswith("-") else value
    meant = [f"{key}={value}" for key in ([name] if name in names() else candidates(name))]
    if not meant:
        return f"unknown option {option}; --help lists the options and the keys"
    return f"unknown option {option}; keys are no options, type {' or '.join(meant)}"


def _train(arguments: list[str], stop: StopRequest) -> int:
    began_s = time.time()
    try:
        return _train_or_check(arguments, stop)
    except Exception as error:
        _leave_outcome(arguments, error, since_s=began_s)
        raise


def _leave_outcome(arguments: list[str], error: Exception, *, since_s: float) -> None:
    """Writes into the run's folder why it did not begin, where the folder can be known."""
    if "--dry-run" in arguments:
        return
    from dan_dist.config import find_output
    from dan_dist.run.outcome import write_refusal

    if folder := find_output(arguments):
        write_refusal(folder, reason=words(error), since_s=since_s)


def _train_or_check(arguments: list[str], stop: StopRequest) -> int:
    from dan_dist.config import load_config, shipped_folder
    from dan_dist.keys import describe

    command = read_train_command(arguments)
    if command.help:
        shipped = ", ".join(sorted(path.stem for path in shipped_folder().glob("*.yaml")))
        shipped = textwrap.fill(f"{shipped}.", 100, break_on_hyphens=False)
        print(TRAIN.format(shipped=shipped, keys=describe()))
        return 0
    if command.dry_run:
        cli.set_log_lines(prefix="# ")
    config = load_config(command.config, command.overrides)
    if command.dry_run:
        return _dry_run(config, command.ranks)
    stop.wait_for_step = has_launcher()  # until this rank can tell the others
    with cli.imports():
        from dan_dist.train import main

    status = main(config, stop).status
    return PREEMPTED if status == "preempted" and not has_launcher() else 0


def _dry_run(config: "Config", ranks: int | None) -> int:
    """All that is printed is the resolved YAML, and comments in it."""
    launch = read_launch()
    if launch.rank:
        return 0
    with cli.imports():
        from dan_dist.config import to_yaml
        from dan_dist.dry_run import check

    check(config, ranks or launch.world_size, is_here=ranks is None)
    print(to_yaml(config), end="")
    return 0


def _evaluate(arguments: list[str], stop: StopRequest) -> int:
    from dan_dist.options import EvaluateCommand

    options = cli.parse(EvaluateCommand, arguments)
    with cli.imports():
        from dan_dist.evaluation.matrix import main

    stop.where = "while evaluating"
    main(options)
    return 0


def _certify(arguments: list[str], stop: StopRequest) -> int:
    from dan_dist.config import load_config
    from dan_dist.options import CertifyOptions

    options = cli.parse(CertifyOptions, arguments)
    if not any(word.endswith(".json") for word in options.words):
        load_config(options.words[0], options.words[1:])
    with cli.imports():
        from dan_dist.certificate import main

    stop.where = "while certifying"
    return FAILED if main(options) else 0


def _predict(arguments: list[str], stop: StopRequest) -> int:
    from dan_dist.options import PredictOptions

    options = cli.parse(PredictOptions, arguments)
    cli.set_log_lines(stream=sys.stderr)  # predictions alone go to the standard output
    with cli.imports():
        from dan_dist.inference.predict import main

    stop.where = "while predicting"
    return FAILED if main(options) else 0


def _explain(arguments: list[str], stop: StopRequest) -> int:
    from dan_dist.options import ExplainOptions

    options = cli.parse(ExplainOptions, arguments)
    with cli.imports():
        from dan_dist.inference.explain import main

    stop.where = "while explaining"
    return FAILED if main(options)["unread"] else 0


def _export(arguments: list[str], stop: StopRequest) -> int:
    from dan_dist.options import ExportOptions

    options = cli.parse(ExportOptions, arguments)
    with cli.imports():
        from dan_dist.inference.export import main

    stop.where = "while exporting"
    main(options)
    return 0


def _ablate(arguments: list[str], stop: StopRequest) -> int:
    from dan_dist.config import load_config
    from dan_dist.options import AblateOptions

    options = cli.parse(AblateOptions, arguments)
    for name, least in (("seeds", 1), ("nproc", 1), ("folds", 2)):
        if (value := getattr(options, name)) is not None and not least <= value <= MOST_RUNS:
            raise ValueError(f"--{name} is {value}, expected {least} to {MOST_RUNS}")
    from dan_dist.ablation import grid

    load_config(options.config, grid.parse(options.words)[2])
    with cli.imports():
        from dan_dist.ablation.ablate import main

    stop.where = "while comparing; the same command resumes"
    return main(options, stop)
