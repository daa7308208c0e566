"""Tallies of parts give the same sums in any order and division, which is what other machines rely on."""

from collections import Counter

import numpy as np
import pytest

from dino_jax.data import summary
from dino_jax.data.examination import Finding, Values


class Named:
    num_classes = 0

    def name(self, record):
        return f"{record}.png"


def findings(number):
    rng = np.random.default_rng(0)
    bad = [Finding(record, "damaged") for record in range(0, number, 7)]
    good = [
        Finding(
            record,
            kind=("PNG RGB", "JPEG RGB")[record % 2],
            size=(int(rng.integers(1, 30)), int(rng.integers(1, 30))),
            digest=f"{int(rng.integers(40)):032x}",
            moments=np.sort(rng.random((2, 3)), axis=0)[::-1].tolist(),
            values=Values(rng.random(), 2 + rng.random(), 3.0, rng.random(5).tolist()) if record % 3 else None,
        )
        for record in range(number)
        if record % 7
    ]
    return sorted(bad + good)


def test_the_order_of_parts_does_not_matter(monkeypatch):
    monkeypatch.setattr(summary, "DEEP_IMAGES", 20)
    found = findings(100)
    whole = summary.tally(Named(), found)
    parts = [summary.tally(Named(), found[start : start + 13]) for start in range(0, 100, 13)]
    expected = summary.report(whole, [], 0)
    assert expected["images"] == 100
    assert len(whole.samples) == 20
    assert summary.report(summary.merge(parts), [], 0) == expected
    assert summary.report(summary.merge([summary.merge(parts[5:]), summary.merge(parts[:5][::-1])]), [], 0) == expected
    assert summary.merge([]) == summary.Tally()


def test_mean_and_std_are_those_of_numpy():
    found = findings(100)
    moments = np.mean([one.moments for one in found if one.moments], axis=0)
    mean, std = summary.mean_and_std(summary.tally(Named(), found))
    np.testing.assert_allclose(mean, moments[0], rtol=1e-3)
    np.testing.assert_allclose(std, np.sqrt(np.maximum(moments[1] - moments[0] ** 2, 1e-8)), rtol=1e-3)


@pytest.mark.parametrize("number", [1, 2, 3, 8, 51])
def test_the_median_of_counts_is_that_of_numpy(number):
    sides = np.random.default_rng(number).integers(1, 12, number).tolist()
    assert summary._median(Counter(sides)) == int(np.median(sides))


def test_nothing_usable_is_a_report_too():
    report = summary.summarize(Named(), [Finding(0, "damaged"), Finding(1, "gone")])
    assert report["bad"] == {"0.png": "damaged", "1.png": "gone"}
    assert (report["sizes"], report["statistics"], report["values"]) == ({}, {}, {})
