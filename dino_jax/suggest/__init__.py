"""Chooses the settings of a run from its images, its devices and its time: `dino-jax suggest`."""
