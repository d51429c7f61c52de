"""Sends the records that MLflow has missed: python -m dan_dist.tracking replay RUN_FOLDER"""

import argparse
import sys
from pathlib import Path

from dan_dist.tracking.tracker import replay


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dan_dist.tracking")
    parser.add_argument("command", choices=("replay",), help="send what MLflow has missed")
    parser.add_argument("folder", type=Path, help="the run's folder (train.output)")
    options = parser.parse_args(arguments)
    try:
        count = replay(options.folder)
    except Exception as error:  # mlflow's errors share no base but Exception
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{count} records sent")
    return 0


if __name__ == "__main__":
    sys.exit(main())
