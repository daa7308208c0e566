"""Rules from facts to settings, with machines and images that are not here."""

import numpy as np
import pytest

from dino_jax.suggest.choices import Measured, candidates, config_of, suggest
from dino_jax.suggest.facts import Images, Machine
from dino_jax.training.config_checks import check_config

LAPTOP = Machine("cpu", "cpu", devices=2, memory=12 * 2**30, cores=2)
A100 = Machine("gpu", "NVIDIA A100", devices=8, memory=40 * 2**30, cores=96)
DEMO = Images("demo", 12_000, 10, 10_000, 0, 0, 40, 40, 1, (0.1,), (0.3,), 0.0, 0.0)
IMAGENET = Images("tfds:i", 1_281_167, 1_000, 10_000, 0, 0, 375, 500, 3, (0.5,) * 3, (0.2,) * 3, 0.0, 0.0)
COST = {"vit_base": 100.0, "vit_small": 30.0, "vit_tiny": 10.0, "vit_nano": 0.1}  # FLOPs of an image, made up


def choose(images, machine, hours=1.0, rate=1_000.0, peak=0, test=""):
    """The config for a machine that trains ViT-S on `rate` images per second."""

    def speed(config):
        return rate * COST["vit_small"] / COST[config.model.arch]

    choices = suggest(
        images,
        machine,
        hours,
        test,
        flops_rate=rate * COST["vit_small"],
        flops_of=lambda config: COST[config.model.arch],
        measure=lambda config: Measured(speed(config), peak // config.accum_steps),
    )
    config = config_of(choices)
    check_config(config, machine.devices)
    assert len({choice.setting for choice in choices}) == len(choices)
    assert all(choice.reason for choice in choices)
    return config


def test_few_images_on_a_laptop_get_the_small_network():
    config = choose(DEMO, LAPTOP, rate=3.0)
    assert (config.model.arch, config.model.patch_size, config.crops.global_size) == ("vit_nano", 8, 32)
    assert config.head.out_dim == 1_024  # lightly-train's for 20,000 images or fewer
    assert config.dino.teacher_temp == config.dino.warmup_teacher_temp == 0.02
    assert config.model.in_channels == len(config.data.mean) == 1


def test_imagenet_on_eight_gpus_gets_the_recipe_of_the_paper():
    config = choose(IMAGENET, A100, hours=40, rate=8_000)
    assert (config.model.patch_size, config.crops.global_size, config.crops.local_size) == (16, 224, 96)
    assert (config.head.out_dim, config.dino.teacher_temp, config.dino.teacher_momentum) == (65_536, 0.04, 0.996)
    assert (config.batch_size, config.optim.lr, config.optim.weight_decay_end) == (512, 5e-4, 0.4)
    assert config.optim.warmup_epochs == 10


def test_more_time_buys_a_larger_network_and_then_more_epochs():
    archs = [choose(IMAGENET, A100, hours=hours).model.arch for hours in (3, 10, 400)]
    assert archs == ["vit_tiny", "vit_small", "vit_base"]
    assert choose(IMAGENET, A100, hours=800).epochs > 1.9 * choose(IMAGENET, A100, hours=400).epochs


def test_the_run_fits_the_time():
    config = choose(DEMO, LAPTOP, hours=2, rate=3.0)
    rate = 3.0 * COST["vit_small"] / COST["vit_nano"]
    assert config.epochs * (12_000 // config.batch_size) * config.batch_size / rate == pytest.approx(
        0.9 * 7_200, rel=0.01
    )


def test_few_images_are_not_learned_by_heart():
    assert choose(DEMO._replace(number=500), LAPTOP, hours=1_000, rate=3.0).epochs == 1_000


@pytest.mark.parametrize("number", [2, 10, 31, 33, 500])
@pytest.mark.parametrize("machine", [LAPTOP, A100._replace(devices=2)])
def test_a_batch_is_never_larger_than_the_images(number, machine):
    assert choose(DEMO._replace(number=number), machine).batch_size <= number


def test_a_step_that_takes_too_much_memory_is_divided():
    assert choose(IMAGENET, A100, peak=100 * 2**30).accum_steps == 4
    assert choose(IMAGENET, A100, peak=30 * 2**30).accum_steps == 1


def test_scans_of_12_bits_get_their_level_of_white():
    scans = DEMO._replace(brightest=4_000.0, white=65_535.0)
    chosen = choose(scans._replace(mean=(0.02,), std=(0.01,)), LAPTOP).data
    assert chosen.range == (0, 4_095)
    np.testing.assert_allclose((*chosen.mean, *chosen.std), (0.32, 0.16), rtol=0.01)  # of pixels in that range
    assert choose(scans._replace(brightest=60_000.0), LAPTOP).data.range == (0, 0)


@pytest.mark.parametrize("side", [1, 28, 40, 64, 96, 150, 224, 3_000])
def test_crops_fit_images_of_any_size(side):
    for size in candidates(DEMO._replace(short_side=side, long_side=side)):
        assert 32 <= size.crop <= 224
        assert size.crop % size.patch == 0
        assert size.crop <= max(32, 1.1 * side)


def test_evaluations_are_about_ten_a_run_whatever_its_epochs():
    config = choose(DEMO._replace(number=500), LAPTOP, hours=1_000, rate=3.0, test="demo:test")
    assert config.evals.probe.every_epochs == config.evals.knn.every_epochs == 100
    assert config.evals.knn.test == "demo:test"
