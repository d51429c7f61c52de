"""A thousand faults, and a table of what became of them.

    python tests/chaos.py [--faults 1000] [--seed 7] [--kinds images,sigterm] [--minutes 180]

Two sorts. Spoiled inputs, lying servers and full disks under programs of this process: each fault
ends in a right result, or in one documented line of error, in bounded time and memory; it depends
on the seed, its kind and its number alone, so that `--kinds images --first 57 --faults 1` makes it
again. And real trainings that are killed, stopped, robbed of disk, data and tracking server at
random steps (`chaos_trainings.py`): each ends as if nothing had happened.

Ends with a table, and with code 1 where a fault was not held or shared memory is left, which takes
a machine that does nothing else. Full disks need root, to mount small ones; others leave them out.
"""

if __name__ == "__main__":  # forked ranks import this file too
    from chaos_command import main

    from shards.command import end

    end(main())
