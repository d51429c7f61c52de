"""The programs by name: python -m dan_dist PROGRAM …"""

import sys

from shards.command import listen

if __name__ == "__main__":
    listen()  # a signal may come during the imports below

from dan_dist import programs

PROGRAMS = ("train", "evaluate", "predict", "explain", "export", "ablate", "certify")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: python -m dan_dist {{{','.join(PROGRAMS)}}} …")
    getattr(programs, sys.argv.pop(1))()
