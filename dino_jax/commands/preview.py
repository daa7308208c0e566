"""Draws the crops that a recipe makes of your images, to inspect them before training.

    dino-jax preview --config=vits16 --config.data.source=folder:photos --images=4

Each row of the picture shows an image, its global crops and its local crops. Labels state the size that the network
sees, in pixels.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dino_jax import atomic
from dino_jax.commands import cli
from dino_jax.errors import UserError
from dino_jax.report.crops import load_crops, picture

USAGE = "--config.data.source=SOURCE [--output=FILE] [--config=RECIPE] [--config.KEY=VALUE ...]"


def define_flags(arguments: Sequence[str]) -> cli.Settings:
    """Defines the flags for the picture, and returns a recipe's settings."""
    flags.DEFINE_string("output", "crops.png", "the picture to write, .png or .jpg")
    flags.DEFINE_integer("images", 4, "number of images, one per row")
    return cli.recipe(arguments, default="default")


def main(arguments: Sequence[str]) -> None:
    """Writes the picture to --output."""
    cli.require_no_arguments(arguments)
    config, output, images = flags.FLAGS.config, Path(flags.FLAGS.output), flags.FLAGS.images
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--output={output}: the picture's name must end in .png or .jpg")
    batch, crops = load_crops(config, images)
    atomic.write_picture(output, picture(batch, crops, config.data))
    print(f"written to {output}")
