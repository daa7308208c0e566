"""The bundled demo images."""

from dino_jax.data import demo_images
from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.errors import UserError


class DemoSource(Source):
    """A split of the demo images (dino_jax.data.demo_images) in memory: gray uint8 [CANVAS, CANVAS, 1], 10 classes."""

    syntax = "demo[:SPLIT]"
    num_classes = demo_images.NUM_CLASSES

    def __init__(self, split: str):
        if split not in demo_images.SPLITS:
            raise UserError(f"{KNOB}=demo:{split}: the demo set has the splits {' and '.join(demo_images.SPLITS)}")
        self.split = split
        self.images = demo_images.demo_images(split)
        self.labels = demo_images.demo_labels(split)

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """SPLIT, by default train."""
        return cls(rest or "train")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Example:
        return Example(self.images[i], self.label(i))

    def label(self, i: int) -> int:
        """Garment class 0..9."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """Split and number."""
        return f"demo:{self.split} image {i}"
