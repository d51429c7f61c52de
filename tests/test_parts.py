"""The tests' order over workers."""

from types import SimpleNamespace
from typing import Any

import pytest
from parts import in_parts


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_worker_begins_with_slow_tests_and_has_neighbours(workers: int) -> None:
    slow = {3, 4, 5, 20, 21, 22}
    items: Any = [
        SimpleNamespace(number=k, get_closest_marker=lambda name, k=k: name == "slow" and k in slow)
        for k in range(30)
    ]
    order = [item.number for item in in_parts(items, workers)]
    assert sorted(order) == list(range(30))
    size = 30 // workers
    for part in (order[start : start + size] for start in range(0, 30, size)):
        own = [number in slow for number in part]
        assert own == sorted(own, reverse=True) and sum(own) == len(slow) // workers
        assert part == sorted(part, key=lambda number: (number not in slow, number))
