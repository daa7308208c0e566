import numpy as np
import pytest

from dino_jax.evals.common import neighbors


def rows(seed, number, dim=6):
    return np.random.default_rng(seed).standard_normal((number, dim)).astype(np.float32)


def plain(bank, queries, k):
    """Everything at once; rows that are the same have the same similarity."""
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    similarity = queries @ bank.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, nearest, 1), nearest


@pytest.mark.parametrize(
    ("number", "queries", "k", "chunk"),
    [(103, 41, 50, 10), (64, 1, 64, 64), (9, 5, 9, 4), (3000, 20, 20, 700), (3000, 20, 3, 2**17), (2, 3, 1, 1)],
)
def test_same_as_sorting_everything_and_lower_row_first(monkeypatch, number, queries, k, chunk):
    monkeypatch.setattr(neighbors, "BANK_CHUNK", chunk)
    monkeypatch.setattr(neighbors, "SIMILARITIES", 7 * chunk)
    bank, asked = rows(1, number), rows(2, queries)
    bank[number // 2 :] = bank[: number - number // 2]  # every row twice: ties everywhere
    similarity, nearest = neighbors.nearest(bank, asked, k)
    expected, places = plain(bank, asked, k)
    assert np.array_equal(nearest, places)
    # Six products in float32, summed in another order.
    np.testing.assert_allclose(similarity, expected, atol=1e-6)


def test_many_equal_rows_of_a_bank_that_fills_no_chunk():
    bank = np.repeat(rows(1, 1), 1001, axis=0)
    bank[[7, 900]] = -bank[0], rows(2, 1)[0]
    nearest = neighbors.nearest(bank, bank[:1], 999)[1][0]
    assert nearest.tolist() == [i for i in range(1001) if i not in (7, 900)]


def test_a_bank_on_disk_serves(tmp_path):
    bank = rows(1, 50)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    for found, expected in zip(
        neighbors.nearest(mapped, bank[:5], 4), neighbors.nearest(bank, bank[:5], 4), strict=True
    ):
        assert np.array_equal(found, expected)


def test_long_searches_say_how_far_they_are(monkeypatch, capsys):
    monkeypatch.setattr(neighbors, "BANK_CHUNK", 20)
    monkeypatch.setattr(neighbors, "REPORT_EVERY", -1)
    neighbors.nearest(rows(1, 80), rows(2, 3), 2)
    assert "neighbors: 25% of 80 rows" in capsys.readouterr().err
