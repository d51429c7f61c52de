"""Trains DAN: torchrun launch/train.py [config.yaml] [section.key=value …]

Without a configuration: configs/demo.yaml, which draws its own faces. `python launch/train.py` is
world size 1. SIGTERM, SIGUSR1 or Ctrl-C end the run after a checkpoint; the same command goes on.
"""

from dan_dist.entry import run
from dan_dist.stop import PREEMPTED, StopRequest, has_launcher, is_deepspeed_launched


def main(arguments: list[str], stop: StopRequest) -> int:
    """Trains on this rank; returns its exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0

    stop.wait_for_step = has_launcher()  # until this rank can tell the others
    from dan_dist import train
    from dan_dist.config import load_config

    # DeepSpeed's launcher adds --local_rank=N, unless told not to; its environment says that too.
    own = [a for a in arguments if not a.startswith("--local_rank")]
    if is_deepspeed_launched() and not any(a.startswith("engine.name=") for a in own):
        own.append("engine.name=deepspeed")
    path = "configs/demo.yaml"
    if own and "=" not in own[0]:
        path, *own = own
    status = train.main(load_config(path, own), stop).status
    return PREEMPTED if status == "preempted" and not has_launcher() else 0


if __name__ == "__main__":
    run(main)
