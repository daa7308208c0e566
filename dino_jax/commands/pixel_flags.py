"""The flag --range of the commands that decode images."""

from absl import flags

from dino_jax.errors import UserError


def define_range(what: str) -> None:
    """Defines --range=LOW,HIGH."""
    flags.DEFINE_list("range", [], what)


def range_of(parts: list[str]) -> tuple[float, float]:
    """Returns the value of --range as numbers, (0, 0) if it is not set. Raises UserError if it is no range."""
    try:
        low, high = (float(part) for part in parts or ("0", "0"))
    except ValueError as error:
        raise UserError(f"--range={','.join(parts)}: two numbers are needed, such as --range=0,4095") from error
    if parts and not low < high:
        raise UserError(f"--range={low:g},{high:g}: the second number must be larger than the first")
    return low, high
