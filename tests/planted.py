"""How many altered copies of real images are found again.

    python tests/planted.py SHARDS [--images 2000] [--seed 0]

Copies of random training images of a set of shards are cut by up to 5 % a side, mirrored or not,
resized to 48 to 224 pixels, made lighter or darker by up to 20 % and saved anew as JPEG of quality
50 to 95, all at once. Prints how many of them are found.
"""

import argparse
import io
import random

from PIL import Image, ImageEnhance, ImageOps

from shards.format import Split, open_shardset
from shards.leaks import of_split
from shards.likeness import likenesses, same_photographs


def altered(picture: Image.Image, dice: random.Random) -> Image.Image:
    """Cut by up to 5 % a side, mirrored or not, resized, made lighter or darker, saved anew."""
    width, height = picture.size
    left, top, right, bottom = (dice.uniform(0, 0.05) for _ in range(4))
    box = (round(left * width), round(top * height),
           width - round(right * width), height - round(bottom * height))  # fmt: skip
    picture = picture.crop(box)
    if dice.random() < 0.5:
        picture = ImageOps.mirror(picture)
    side = dice.randint(48, 224)
    picture = ImageEnhance.Brightness(picture.resize((side, side))).enhance(dice.uniform(0.8, 1.2))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=dice.randint(50, 95))
    return Image.open(file)


def picture(split: Split, sample: int) -> Image.Image:
    return Image.open(io.BytesIO(split.encoded(sample))).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    split, dice = open_shardset(options.shards).split("train"), random.Random(options.seed)
    chosen = dice.sample(range(len(split)), options.images)
    copies = likenesses(altered(picture(split, k), dice) for k in chosen)
    pairs = same_photographs(of_split(split, workers=1), copies)
    found = set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
    hits = sum((sample, k) in found for k, sample in enumerate(chosen))
    print(f"{hits} of {len(chosen)} altered copies found: {100 * hits / len(chosen):.1f} %")


if __name__ == "__main__":
    main()
