"""Follows a run through its log: what is wrong, since when, and whether it learns."""

from collections.abc import Mapping
from typing import Any

from dino_jax.health.findings import ADVICE, PROGRESS, Finding, findings
from dino_jax.health.history import LATELY, History, number

LEARNING, NOT_LEARNING, COLLAPSED, EARLY = "learning", "not learning", "collapsed", "too early to say"
ENOUGH = 0.05  # share of the run after which signals without a finding count as learning
GAIN = 1.5  # an evaluation has to grow by this factor to count as progress early in a run
SETTLED = 0.2  # share of the run after which any growth counts


class Monitor:
    """Reads the rows of a log in order, and keeps what it finds.

    settings: the config by dotted name. total_steps: of the run. images: in the training source, 0 if unknown.
    """

    def __init__(self, settings: Mapping[str, Any], total_steps: int, images: int = 0):
        self._history = History(settings, total_steps, images, [], [])
        self._active: dict[str, Finding] = {}
        self._records: list[dict[str, Any]] = []  # of all findings, as in health.json

    def update(self, step: int, scalars: Mapping[str, Any]) -> list[str]:
        """Takes the scalars of a step, and returns a line for each finding that appears or is resolved."""
        history, row = self._history, {"step": step, **scalars}
        if "loss" not in row:
            history.evaluations.append(row)
        else:
            history.rows.append(row)
            del history.rows[1:-LATELY]  # the first and the last ones are all that findings compare
        found = {finding.name: finding for finding in findings(history)}
        lines = [self._appeared(step, finding) for name, finding in found.items() if name not in self._active]
        lines += [self._resolved(step, finding) for name, finding in self._active.items() if name not in found]
        self._active = found
        return lines

    @property
    def collapse(self) -> str:
        """The evidence of a collapse; "" if there is none."""
        return next((f"{one.what} ({one.evidence})" for one in self._active.values() if one.collapse), "")

    def verdict(self) -> str:
        """Whether the run learns, in one of four phrases."""
        if self.collapse:
            return COLLAPSED
        if any(name not in ADVICE for name in self._active):
            return NOT_LEARNING
        gains = self._measures()
        factor = GAIN if self._history.progress < SETTLED else 1
        if any(last > factor * first for first, last in gains.values()):
            return LEARNING
        # A log without entropies does not show whether the outputs tell images apart.
        enough = self._history.settled and self._history.progress >= ENOUGH and self._history.always("teacher_entropy")
        return LEARNING if enough and not gains else EARLY

    def report(self) -> dict[str, Any]:
        """The content of WORKDIR/health.json."""
        return {
            "verdict": self.verdict(),
            "step": self._history.step,
            "total_steps": self._history.total_steps,
            "images": self._history.images,
            "findings": self._records,
            "measures": {name: {"first": first, "last": last} for name, (first, last) in self._measures().items()},
        }

    def summary(self) -> str:
        """One line: the verdict, how the measures have changed, and what was found."""
        gains = [f"{name} {first:.1f} -> {last:.1f}" for name, (first, last) in self._measures().items()]
        found = [f"{one['name']} since step {one['since_step']:,}{_until(one)}" for one in self._records]
        return f"{self.verdict()}: {'; '.join([*gains, *(found or ['no findings'])])}"

    def _measures(self) -> dict[str, tuple[float, float]]:
        """First and last value of each measure of progress that was evaluated more than once."""
        history = self._history
        return {name: (values[0], values[-1]) for name in PROGRESS if len(values := history.measured(name)) > 1}

    def _appeared(self, step: int, finding: Finding) -> str:
        self._records.append({**finding.as_json(), "since_step": step, "until_step": None})
        cause, knob, advice = finding.cause
        return f"health: {finding.what} ({finding.evidence}). Likely cause: {cause}. Try {knob}: {advice}"

    def _resolved(self, step: int, finding: Finding) -> str:
        record = next(one for one in reversed(self._records) if one["name"] == finding.name)
        record["until_step"] = step
        return f"health: resolved at step {step:,}: {finding.what}"


def of_log(settings: Mapping[str, Any], total_steps: int, images: int, rows: list[dict[str, Any]]) -> Monitor:
    """Returns a monitor that has read all rows of a log."""
    monitor = Monitor(settings, total_steps, images)
    for row in (row for row in rows if "health" not in row):  # not its own notes
        monitor.update(int(number(row["step"])), {name: value for name, value in row.items() if name != "step"})
    return monitor


def _until(record: Mapping[str, Any]) -> str:
    return "" if record["until_step"] is None else f" until {record['until_step']:,}"
