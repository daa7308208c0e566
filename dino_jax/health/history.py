"""What is known of a run: its settings, and the scalars that it logged so far."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

LATELY = 3  # logged rows that have to agree, because one batch is noisy
FIRST = 500  # steps in which outputs that are alike are no collapse

Row = Mapping[str, Any]


class History(NamedTuple):
    """A run so far."""

    settings: Mapping[str, Any]  # config by dotted name; a log of another code base has few of them
    total_steps: int
    images: int  # in the training source; 0 if unknown
    rows: list[Row]  # scalars of training steps, in order; each has "step"
    evaluations: list[Row]  # scalars of evaluations, in order

    @property
    def step(self) -> int:
        """The last logged step; 0 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        return self.step / max(self.total_steps, 1)

    @property
    def settled(self) -> bool:
        """Whether the first steps are over, in which the outputs of any network are alike."""
        in_steps = self.setting("log_every", 0) > 0  # the logs of other code bases count epochs
        return not in_steps or self.step >= FIRST

    @property
    def ln_k(self) -> float:
        """The entropy of uniform outputs; NaN if the number of prototypes is unknown."""
        prototypes = self.settings.get("head.out_dim")
        return math.log(prototypes) if prototypes else math.nan

    @property
    def cross_entropy(self) -> str:
        """The name of the scalar that is ln K for uniform outputs: see `cross_entropy_of`."""
        return cross_entropy_of(self.rows)

    def lately(self, name: str) -> list[float]:
        """Returns a scalar in each of the last `LATELY` rows, NaN where it is missing or null."""
        return [number(row.get(name)) for row in self.rows[-LATELY:]]

    def last(self, name: str) -> float:
        """Returns a scalar of the last row; NaN if it is missing."""
        return number(self.rows[-1].get(name)) if self.rows else math.nan

    def always(self, name: str, low: float = -math.inf, high: float = math.inf) -> bool:
        """Whether a scalar lay between low and high in each of the last `LATELY` rows. False if there are fewer."""
        values = self.lately(name)
        return len(values) == LATELY and all(low <= value <= high for value in values)

    def setting(self, name: str, default: Any = math.nan) -> Any:
        """Returns a setting, or `default` if it is unknown."""
        return self.settings.get(name, default)

    def measured(self, name: str) -> list[float]:
        """Returns a scalar of all evaluations that have it, in order."""
        return [number(row[name]) for row in self.evaluations if name in row]


def cross_entropy_of(rows: Sequence[Row]) -> str:
    """Returns the name of DINO's loss; other terms may be added in "loss", which is all that other programs log."""
    return "loss_dino" if rows and "loss_dino" in rows[-1] else "loss"


def number(value: Any) -> float:
    """Returns a logged value as a float. metrics.jsonl has null for values that are not finite."""
    return float(value) if isinstance(value, int | float) else math.nan


def information(row: Row) -> float:
    """What a target tells about its image, nats: 0 if all images have the same target."""
    return number(row.get("mean_target_entropy")) - number(row.get("teacher_entropy"))


def split_rows(rows: list[dict[str, Any]]) -> tuple[list[Row], list[Row]]:
    """Separates the rows of a metrics.jsonl into those of training steps and those of evaluations."""
    return [row for row in rows if "loss" in row], [row for row in rows if "loss" not in row]
