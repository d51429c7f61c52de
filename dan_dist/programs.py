"""The programs: `launch/*.py`, `dan-*` and `python -m dan_dist` call these; each ends its process.

Nothing heavy is imported before a program's command line has been read.
"""

from typing import NoReturn

from dan_dist.config import load_config
from dan_dist.options import (
    AblateOptions,
    EvaluateOptions,
    ExplainOptions,
    ExportOptions,
    PredictOptions,
)
from dan_dist.run import cli
from dan_dist.run.environment import has_launcher, is_deepspeed_launched
from dan_dist.run.signals import PREEMPTED, StopRequest

TRAIN = """Trains DAN: torchrun launch/train.py [config.yaml] [section.key=value …]

Without a configuration: configs/demo.yaml, which draws its own faces. `python launch/train.py` is
world size 1. SIGTERM, SIGUSR1 or Ctrl-C end the run after a checkpoint; the same command goes on."""


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


def _train(arguments: list[str], stop: StopRequest) -> int:
    if {"-h", "--help"} & set(arguments):
        print(TRAIN)
        return 0
    # DeepSpeed's launcher adds --local_rank=N, unless told not to; its environment says that too.
    own = [a for a in arguments if not a.startswith("--local_rank")]
    if is_deepspeed_launched() and not any(a.startswith("engine.name=") for a in own):
        own.append("engine.name=deepspeed")
    path = "configs/demo.yaml"
    if own and "=" not in own[0]:
        path, *own = own
    config = load_config(path, own)
    stop.wait_for_step = has_launcher()  # until this rank can tell the others
    from dan_dist.train import main

    status = main(config, stop).status
    return PREEMPTED if status == "preempted" and not has_launcher() else 0


def _evaluate(arguments: list[str], stop: StopRequest) -> int:
    options = cli.parse(EvaluateOptions, arguments)
    from dan_dist.evaluation.evaluate import main

    main(options)
    return 0


def _predict(arguments: list[str], stop: StopRequest) -> int:
    options = cli.parse(PredictOptions, arguments)
    from dan_dist.inference.predict import main

    return cli.FAILED if main(options) else 0


def _explain(arguments: list[str], stop: StopRequest) -> int:
    options = cli.parse(ExplainOptions, arguments)
    from dan_dist.inference.explain import main

    return cli.FAILED if main(options)["unread"] else 0


def _export(arguments: list[str], stop: StopRequest) -> int:
    options = cli.parse(ExportOptions, arguments)
    from dan_dist.inference.export import main

    main(options)
    return 0


def _ablate(arguments: list[str], stop: StopRequest) -> int:
    options = cli.parse(AblateOptions, arguments)
    for name in ("seeds", "nproc"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}, expected 1 or more")
    from dan_dist.ablation.ablate import main

    return main(options, stop)
