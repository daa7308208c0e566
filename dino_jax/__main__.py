"""`python -m dino_jax COMMAND`: the same as `dino-jax COMMAND`."""

from dino_jax.commands.cli import main

if __name__ == "__main__":
    main()
