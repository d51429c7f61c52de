"""Time and efficiency on more GPUs than there are, from parts measured on those that there are.

A step on n ranks takes what one rank's step takes at its batch, plus what the ranks exchange in it,
or what a rank's loader takes, whichever is more. Nothing of the exchange is taken to hide behind
the backward pass, which makes it too long; BatchNorm over ranks is taken to compute as fast as one
rank's, which has kernels of its own, and makes it too short.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

RANKS = (1, 8, 16, 64)
HEADS = ("GPUs", "images each", "ms a step", "of that exchange", "images/s", "s a million images",
         "of linear")  # fmt: skip
BUCKETS_BYTES = 25 * 2**20  # DDP's: each is a message of its own


@dataclass(frozen=True)
class Links:
    """What ranks are joined by. Not measured."""

    ranks_a_node: int = 8
    inside_gb_s: float = 200.0  # of a rank, to the others of its node
    between_gb_s: float = 50.0  # of a node, to the others
    inside_s: float = 15e-6  # of a small message to all of a node, there and back
    between_s: float = 30e-6


@dataclass(frozen=True)
class Parts:
    """What a projection is made of."""

    step_s: Mapping[int, float]  # one rank's step, by its images
    loader_images_s: float  # of one rank, on
    loader_threads: int  # its share of a node's cores
    gradient_bytes: int
    norms: int  # BatchNorms, each of which exchanges its statistics twice a step
    links: Links = Links()


class Projection(NamedTuple):
    """A number of ranks, and what is expected of them."""

    ranks: int
    images: int  # of a rank, a step
    step_s: float
    exchange_s: float  # of that
    images_s: float
    efficiency: float  # in parts of as many times one rank's images/s


def exchange_s(parts: Parts, ranks: int) -> float:
    """Seconds a step of rings that sum the gradients, and of BatchNorm's messages."""
    if ranks == 1:
        return 0.0
    links = parts.links
    nodes = -(-ranks // links.ranks_a_node)
    own = min(ranks, links.ranks_a_node)
    small_s = links.inside_s + (links.between_s if nodes > 1 else 0.0)
    sent_s = 2 * (own - 1) / own * parts.gradient_bytes / (1e9 * links.inside_gb_s)
    sent_s += 2 * (nodes - 1) / nodes * parts.gradient_bytes / (1e9 * links.between_gb_s)
    messages = -(-parts.gradient_bytes // BUCKETS_BYTES) + 2 * parts.norms
    return sent_s + messages * small_s


def project(parts: Parts, ranks: int, images: int) -> Projection:
    """What is expected of so many ranks with so many images each."""
    exchanged_s = exchange_s(parts, ranks)
    step_s = max(parts.step_s[images] + exchanged_s, images / parts.loader_images_s)
    rate = ranks * images / step_s
    largest = max(parts.step_s)
    alone = largest / max(parts.step_s[largest], largest / parts.loader_images_s)
    return Projection(ranks, images, step_s, exchanged_s, rate, rate / (ranks * alone))


def tables(parts: Parts, batch: int) -> dict[str, list[Projection]]:
    """strong: the batch stays, so that each rank has fewer images. weak: each rank has as many.

    parts.step_s: of the batches of both, `batches(batch)`.
    """
    strong = [project(parts, n, batch // n) for n in RANKS if batch >= 2 * n]
    return {"strong": strong, "weak": [project(parts, n, batch) for n in RANKS]}


def batches(batch: int) -> list[int]:
    """The images of a rank at which a step is to be measured, most first."""
    return sorted({batch // n for n in RANKS if batch >= 2 * n}, reverse=True)


def show_projection(parts: Parts, found: Mapping[str, list[Projection]]) -> None:
    """Prints the tables in Markdown, and which of their parts were measured."""
    for name, rows in found.items():
        print(f"\nProjected, {name} scaling\n")
        print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
        for row in rows:
            print(f"| {row.ranks} | {row.images} | {1e3 * row.step_s:.1f} | "
                  f"{1e3 * row.exchange_s:.1f} | {row.images_s:.0f} | {1e6 / row.images_s:.0f} | "
                  f"{100 * row.efficiency:.1f} % |")  # fmt: skip
    links = parts.links
    steps = ", ".join(f"{n}: {1e3 * s:.1f} ms" for n, s in sorted(parts.step_s.items()))
    print(
        f"\nMeasured here: one rank's step by its images ({steps}), its loader on "
        f"{parts.loader_threads} threads, this machine's cores ÷ {links.ranks_a_node} ranks of a "
        f"node ({parts.loader_images_s:.0f} images/s). Counted: {parts.gradient_bytes / 1e6:.0f} "
        f"MB of gradients, {parts.norms} BatchNorms. Not measured: links of "
        f"{links.inside_gb_s:g} GB/s inside a node and {links.between_gb_s:g} GB/s between nodes, "
        f"{1e6 * links.inside_s:.0f} and {1e6 * links.between_s:.0f} µs a message; that nothing of "
        "the exchange hides behind the backward pass; that BatchNorm over ranks, but for its "
        "messages, takes no longer than one rank's; that storage keeps up."
    )
