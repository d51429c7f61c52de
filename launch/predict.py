"""Says what faces express: launch/predict.py CHECKPOINT IMAGE|FOLDER… [--json]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this clone's code comes first

from dan_dist.programs import predict

if __name__ == "__main__":
    predict()
