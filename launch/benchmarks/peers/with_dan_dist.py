"""This project's order, asked as its peers are; in an environment with numpy alone."""

from collections.abc import Iterator

from benchmarks.peers.question import BATCH, SEED, Batch, ask, labels_of
from dan_dist.data.sampler import augmentation_uniforms, epoch_order, group_samples, rank_columns


class DanDist:
    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        groups, columns = (
            group_samples(labels_of(), balanced=True),
            rank_columns(BATCH, rank, world),
        )
        order = epoch_order(groups, global_batch=BATCH, seed=SEED, epoch=0)
        for step in range(start, len(order)):
            numbers = augmentation_uniforms(SEED, step, BATCH, 1)[columns, 0]
            yield Batch(order[step, columns].tolist(), numbers.tolist())

    def order(self, samples: int) -> Iterator[int]:
        groups = group_samples(labels_of(samples), balanced=True)
        yield epoch_order(groups, global_batch=256, seed=SEED, epoch=0).size


if __name__ == "__main__":
    ask(DanDist())
