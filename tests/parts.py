"""Which tests each of xdist's workers begins with."""

import pytest


def in_parts(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order whose equal parts, one a worker, begin with slow ones.

    At the end, short ones are left to be shared out; and neighbours, which may wait for the same
    trained run, are one worker's.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    return [item for worker in range(workers) for own in (slow, others)
            for item in own[len(own) * worker // workers : len(own) * (worker + 1) // workers]
            ]  # fmt: skip
