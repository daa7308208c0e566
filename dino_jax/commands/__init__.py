"""The commands of `dino-jax`, one module each."""
