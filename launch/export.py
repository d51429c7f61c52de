"""Exports a checkpoint for use elsewhere: launch/export.py CHECKPOINT [--output FOLDER]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's code comes first

from dan_dist.programs import export

if __name__ == "__main__":
    export()
