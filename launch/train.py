"""Trains DAN: torchrun launch/train.py [CONFIG] [section.key=value …]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's code comes first

from shards.command import listen

if __name__ == "__main__":
    listen()  # a signal may come during the imports below

from dan_dist.programs import train

if __name__ == "__main__":
    train()
