"""What MLflow has missed, and a run's model by a name of its own:

python -m dan_dist.tracking replay RUN_FOLDER
python -m dan_dist.tracking register RUN_FOLDER NAME [--alias champion]
"""

from shards import command

if __name__ == "__main__":  # before MLflow is imported: a signal may come meanwhile
    command.run("dan_dist.tracking.__main__", "while sending; the same command sends the rest")

import argparse
import sys
from pathlib import Path

from dan_dist.run.environment import give_home
from dan_dist.tracking.faults import reason_of
from dan_dist.tracking.registry import register
from dan_dist.tracking.tracker import replay


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 1 where MLflow refuses a part of the run."""
    parser = argparse.ArgumentParser(prog="python -m dan_dist.tracking")
    commands = parser.add_subparsers(dest="command", required=True)
    replaying = commands.add_parser("replay", help="send what MLflow has missed")
    registering = commands.add_parser("register", help="give the run's model a name")
    for kind in (replaying, registering):
        kind.add_argument("folder", type=Path, help="the run's folder (train.output)")
    registering.add_argument("name", help="of the model, in MLflow's registry")
    registering.add_argument("--alias", default="champion", help="default: champion")
    options = parser.parse_args(arguments)
    give_home()
    try:
        if options.command == "register":
            print(f"registered: {register(options.folder, options.name, options.alias)}")
            return 0
        count, left_out = replay(options.folder)
    except Exception as error:  # mlflow's errors share no base but Exception
        print(f"error: {reason_of(error)}", file=sys.stderr)
        return command.USAGE
    print(f"{count} records sent")
    for item in left_out:
        print(f"left out: {item.what}: {item.reason}")
    return command.FAILED if left_out else 0
