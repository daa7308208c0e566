"""Block masks: the reference's distribution, its constants, and independence of the number of devices."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.data import masks
from dino_jax.data.multicrop import Crops

SETTINGS = masks.MaskSettings((4, 4), 8, images=4, probability=0.5, ratio=(0.1, 0.5))


@pytest.fixture(scope="module")
def reference(goldens2_dir):
    return json.loads((goldens2_dir / "masking.json").read_text())


def draw(grid, largest, wanted, draws):
    keys = jax.random.split(jax.random.key(0), draws)
    mask = partial(masks.block_mask, wanted=jnp.int32(wanted), grid=grid, largest=largest)
    return np.asarray(jax.jit(jax.vmap(mask))(keys))


def test_masks_are_distributed_as_the_references(reference, golden2):
    """Both are samples of 500 or more, so means agree within 5 of their standard errors; see masking.json."""
    means, _ = golden2("masking")
    for one in reference["generator"]:
        grid, wanted, draws = tuple(one["grid"]), one["requested"], 2_000
        drawn = draw(grid, int(one["max_num_patches"]), wanted, draws)
        counts = drawn.sum((1, 2))
        assert counts.max() <= wanted
        expected, spread = one["masked"]["mean"], max(one["masked"]["std"], 0.05)
        error = 5 * spread * (1 / reference["draws"] + 1 / draws) ** 0.5
        assert abs(counts.mean() - expected) < error, (grid, wanted)
        share = one["fraction_of_draws_exact"]
        error = 5 * (max(share * (1 - share), 0.01) * (1 / reference["draws"] + 1 / draws)) ** 0.5
        assert abs((counts == wanted).mean() - share) < error, (grid, wanted)
        # Where in the grid: every cell is as often masked as in the reference's draws.
        theirs = means[f"mean_mask/{grid[0]}x{grid[1]}_n{wanted}"]
        error = 5 * (0.25 * (1 / reference["draws"] + 1 / draws)) ** 0.5
        np.testing.assert_allclose(drawn.mean(0), theirs, atol=error, err_msg=f"{grid} {wanted}")


def test_groups_have_the_references_numbers(reference):
    for one in reference["collate"]:
        c = one["config"]
        settings = masks.MaskSettings(
            (c["grid"], c["grid"]), masks.largest_block(c["img"], c["patch"]), c["batch"], c["prob"], tuple(c["ratio"])
        )
        assert settings.masked_crops == one["n_samples_masked"]
        assert settings.bound == one["upperbound"]
        np.testing.assert_array_equal(settings.ratios, np.float32(one["linspace_float32"]))
        drawn = np.asarray(masks.group_masks(jax.random.key(1), settings))
        counts = np.sort(drawn.sum(-1).ravel())[-settings.masked_crops :]
        assert (drawn.sum(-1) > 0).sum() <= settings.masked_crops
        most = [int(settings.patches * float(ratio)) for ratio in settings.ratios[1:]]
        assert (counts <= most).all()


@pytest.mark.parametrize(("image", "patch", "most"), [(224, 16, 98), (224, 14, 128), (98, 14, 21)])
def test_the_largest_block_is_rounded_as_in_the_reference(image, patch, most):
    assert masks.largest_block(image, patch) == most


def test_rows_and_weights_name_the_masked_patches(golden2):
    arrays, _ = golden2("masking")
    for key in ("collate0", "collate1", "collate2"):
        drawn, count = arrays[f"{key}/masks"], int(arrays[f"{key}/n_masked_patches"][0])
        rows, weights = masks.masked_rows(jnp.asarray(drawn), count + 5)
        np.testing.assert_array_equal(rows[:count], arrays[f"{key}/mask_indices"])
        np.testing.assert_allclose(weights[:count], arrays[f"{key}/masks_weight"], rtol=1e-6)
        np.testing.assert_array_equal(weights[count:], 0)


def test_a_part_of_the_batch_draws_the_same_masks():
    keys = jax.random.split(jax.random.key(2), 8)
    crops = Crops(jnp.zeros((8, 2, 1, 1, 1)), jnp.zeros((8, 0, 1, 1, 1)))
    whole = masks.mask_crops(keys, crops, SETTINGS)
    half = masks.mask_crops(keys[4:], Crops(crops.global_crops[4:], crops.local_crops[4:]), SETTINGS)
    np.testing.assert_array_equal(half.masks, whole.masks[4:])
    np.testing.assert_array_equal(half.rows, whole.rows[1:])
    masked = whole.masks.reshape(-1)[whole.flat_rows()]
    np.testing.assert_array_equal(masked, whole.weights.ravel() > 0)
    assert 0 < masked.sum() == whole.masks.sum()
