"""Trains DAN: torchrun launch/train.py [config.yaml] [section.key=value …]

Without a configuration: configs/demo.yaml, which draws its own faces. `python launch/train.py` is
world size 1. SIGTERM, SIGUSR1 or Ctrl-C end the run after a checkpoint; the same command goes on.
"""

import logging
import os
import sys
import time
import warnings

from dan_dist.stop import PREEMPTED, Stopped, StopRequest, end_with_launcher, has_launcher

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes; see dan_dist/stop.py for the others
RANK_0_FIRST_S = 5.0


def main(arguments: list[str], stop: StopRequest) -> int:
    """Runs one rank; returns its exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    rank = int(os.environ.get("RANK", 0))
    # Rank 0 speaks; the others only when something is wrong.
    prefix = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(format=f"{prefix}%(message)s", stream=sys.stdout, force=True)
    for name in ("dan_dist", "shards"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)

    from tqdm.contrib.logging import logging_redirect_tqdm

    from dan_dist import train
    from dan_dist.config import load_config

    # DeepSpeed's launcher adds --local_rank=N, which its environment says too.
    own = [a for a in arguments if not a.startswith("--local_rank")]
    if own != arguments and not any(a.startswith("engine.name=") for a in own):
        own.append("engine.name=deepspeed")
    path, arguments = "configs/demo.yaml", own
    if arguments and "=" not in arguments[0]:
        path, *arguments = arguments
    try:
        with logging_redirect_tqdm():
            status = train.main(load_config(path, arguments), stop).status
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DAN_TRACEBACK"):
            raise
        if rank and stop.signal is None:
            # Rank 0 mostly fails of the same and says so; torchrun then ends this process. Where
            # it does not, this rank alone knows what is wrong.
            time.sleep(RANK_0_FIRST_S)
        print(f"error: {prefix}{error}", file=sys.stderr, flush=True)
        return FAILED if isinstance(error, ConnectionError) else USAGE
    if status == "preempted" and not has_launcher():
        return PREEMPTED
    return 0


if __name__ == "__main__":
    # Before torch is imported, which takes seconds in which a signal may come.
    end_with_launcher()
    request = StopRequest()
    request.install()
    try:
        sys.exit(main(sys.argv[1:], request))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}: stopped before or after training", file=sys.stderr)
        sys.exit(0 if has_launcher() else INTERRUPTED)
