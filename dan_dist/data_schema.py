"""The schema's part on the data: shards, order, augmentation, the drawn faces."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dan_dist.values import (
    ORDERS,
    SOURCE,
    Amount,
    PathText,
    Probability,
    Reads,
    Section,
    Seed,
    Share,
    check_fold,
    check_sampling,
    check_shards,
)

Drawn = Annotated[int, Field(ge=1, le=10_000_000)]


class Synthetic(Section):
    """Drawn faces, packed into data.shards on first use; null draws none."""

    train: Drawn = Field(
        description="training images: of expressions in AffectNet's proportions, of identities "
        "evenly"
    )
    val: Drawn = Field(description="validation images, evenly over the classes")
    size: int = Field(ge=1, le=1024, description="side of an image in pixels")
    seed: Seed = Field(default=0, description="of the drawing; another one draws other faces")
    by: Literal["expression", "identity"] = Field(
        default="expression", description="what the classes are"
    )
    identities: Drawn = Field(default=400, description="by identity: persons in training")
    held_out: Drawn = Field(default=40, description="by identity: other persons, in validation")


class Augmentation(Section):
    """What happens to training images."""

    flip_p: Probability = Field(default=0.5, description="probability that an image is mirrored")
    affine_p: Probability = Field(default=0.0, description="probability that an image is warped")
    degrees: float = Field(
        default=0.0, ge=0, le=180, description="warp: largest rotation, either way"
    )
    scale: list[Annotated[float, Field(ge=0.01, le=100)]] = Field(
        default=[1.0, 1.0],
        min_length=2,
        max_length=2,
        description="warp: smallest and largest scale",
    )
    translate: Probability = Field(
        default=0.0, description="warp: largest shift on each axis, of the image's side"
    )
    erase_p: Probability = Field(
        default=0.0, description="probability that a random rectangle is erased from an image"
    )
    erase_area: list[Probability] = Field(
        default=[0.02, 0.33],
        min_length=2,
        max_length=2,
        description="smallest and largest area of that rectangle, of the image's",
    )


class Data(Section):
    """The images, and the order in which they come."""

    shards: PathText | list[Annotated[dict[str, Any], Reads(keys=SOURCE)]] = Field(
        description="folder of shards (with manifest.json), or its URL; relative to the working "
        "folder; or several as {path, share, classes}, of shares 1 unless given, with the names "
        "that their classes have here"
    )
    cache: PathText | None = Field(
        default=None, description="folder on each node into which the shards are copied first"
    )
    classes: list[str] | None = Field(
        default=None,
        description="class names that the shards must have, in label order; null takes theirs",
    )
    val_split: str = Field(
        default="val",
        description="split on which the best epoch is chosen, unless images are held out for it",
    )
    holdout: Share | None = Field(
        default=None,
        description="share of each class's training images that is held out of training, and on "
        "which the best epoch is chosen; images of one group stay together",
    )
    fold: str | None = Field(
        default=None, description="the same as the k-th of n equal parts, k/n; as 1/5"
    )
    test_split: str | None = Field(
        default=None,
        description="split that is looked at once, after training, with the chosen weights: the "
        "run's result",
    )
    protocol: Literal["paper"] | None = Field(
        default=None,
        description="paper: val_split is the published test split, on which the authors choose "
        "the best epoch; null: it is not",
    )
    pairs: int = Field(
        default=6000,
        ge=20,
        le=1_000_000,
        description="task identity: pairs of images drawn from val_split",
    )
    pairs_file: PathText | None = Field(
        default=None,
        description="task identity: a file that lists the pairs, in place of drawn ones",
    )
    sampling: str | Annotated[dict[str, Any], Reads(keys=ORDERS)] = Field(
        default="balanced",
        description="training images: as many of each class (balanced), or each once an epoch "
        "(shuffle); or classes by count to a power {power: t}, by effective numbers {effective: "
        "beta}, by {shares: {class: number}}; or one after another, {from: …, to: …, epochs: n}",
    )
    augment: Augmentation = Augmentation()
    max_bad_images: Amount = Field(
        default=100,
        description="damaged images over all ranks that are replaced; one more is an error",
    )
    threads: Annotated[int, Field(ge=1, le=256)] | None = Field(
        default=None, description="cores that a rank decodes on; null: its share of the node's"
    )
    decoded: Literal["none", "host", "device"] = Field(
        default="none",
        description="training images decoded once: into a file in data.cache whose memory a node's "
        "ranks share, or into each rank's GPU; none: whenever they are drawn",
    )
    synthetic: Synthetic | None = None

    _check_shards = field_validator("shards")(check_shards)
    _check_sampling = field_validator("sampling")(check_sampling)
    _check_fold = field_validator("fold")(check_fold)

    @model_validator(mode="after")
    def _check_selection(self) -> "Data":
        is_cut = self.holdout is not None or self.fold is not None
        if self.holdout is not None and self.fold is not None:
            raise ValueError("data.fold: data.holdout is given already")
        if self.protocol == "paper" and (is_cut or self.test_split is not None):
            raise ValueError(
                "data.protocol: paper chooses on the test split, val_split; data.holdout, "
                "data.fold and data.test_split must be null"
            )
        if self.test_split == "train":
            raise ValueError("data.test_split is 'train', expected a split without training images")
        if self.test_split == self.val_split and not is_cut:
            raise ValueError(
                f"data.test_split is '{self.test_split}', on which the best epoch is chosen; hold "
                "images out by data.holdout, or choose on it by data.protocol=paper alone"
            )
        return self

    @property
    def paths(self) -> list[str]:
        """The folder or URL of each set."""
        return [self.shards] if isinstance(self.shards, str) else [s["path"] for s in self.shards]
