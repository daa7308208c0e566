"""Every numeric setting has a finite range, and what cannot work is refused in one line before anything is compiled."""

import math

import pytest
from tiny import tiny_config

from dino_jax import recipes
from dino_jax.errors import UserError
from dino_jax.evals import PROTOCOLS
from dino_jax.limits import check_numbers
from dino_jax.provenance import flat
from dino_jax.training.config_checks import LIMITS, check_config

INF, NAN = math.inf, math.nan
RESNET = {"model.arch": "resnet18"}
REFUSED = [
    RESNET | {"crops.global_size": 0},
    RESNET | {"crops.global_size": -5},
    RESNET | {"crops.local_size": -3},
    RESNET | {"eval.crop": 0},
    {"eval.resize": 0, "eval.crop": -8},
    {"crops.local_size": -8},
    {"checkpoint.stop_within": -1},
    {"checkpoint.stop_within": 0},
    {"optim.min_lr": INF},
    {"optim.weight_decay": INF},
    {"optim.weight_decay_end": NAN},
    {"optim.lr": 1e308},
    {"optim.clip_grad": INF},
    {"optim.skip_above": INF},
    {"health.stop": "always"},
    {"crops.brightness": INF},
    {"crops.hue": INF},
    {"crops.blur_sigma": (0.1, INF)},
    {"crops.local_scale": (NAN, 1.0)},
    {"crops.global_scale": (0.0, 1.0)},
    {"crops.flip": NAN},
    {"data.mean": (NAN,)},
    {"data.mean": (INF,)},
    {"data.std": (NAN,)},
    {"data.std": (INF,)},
    {"data.stall_timeout": NAN},
    {"data.stall_timeout": 1e300},
    {"data.max_bad_fraction": NAN},
    {"data.canvas_size": 100_000},
    {"data.workers": 10_000},
    {"seed": 2**63},
    {"batch_size": 2**40},
    {"epochs": 2.0**40},
    {"epochs": 0},
    {"epochs": NAN},
    {"head.out_dim": 1},
    {"dino.teacher_temp": 1e-300},
    {"dino.student_temp": 1e300},
    {"dino.center_momentum": NAN},
    {"distributed.process_id": -1},
    {"evals.knn.k": 0},
    {"evals.knn.every_epochs": -1},
    {"loss_weights.dino": NAN},
    {"epochs": 1, "optim.warmup_epochs": 0, "optim.freeze_last_layer_epochs": 1},
    {"epochs": 5, "optim.freeze_last_layer_epochs": 10},
    {"epochs": 5, "dino.warmup_teacher_temp_epochs": 30},
]
SHORT = {"epochs": 0.5, "optim.warmup_epochs": 0, "optim.freeze_last_layer_epochs": 0}
ACCEPTED = [
    SHORT,
    SHORT
    | {"optim.warmup_epochs": 0.1, "dino.warmup_teacher_temp_epochs": 0.2, "optim.freeze_last_layer_epochs": 0.25},
    {"seed": 2**32},
    {"crops.local_number": 0},
    {"evals.knn.every_epochs": 0},
    {"optim.lr": 1e6},
    {"watchdog.seconds": 0},
    {"data.stall_timeout": 0},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_what_cannot_work_is_refused_by_its_name(changes):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        check_config(config, devices=8)
    assert f"--config.{list(changes)[-1]} " in str(error.value) or f"--config.{list(changes)[0]} " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_what_works_is_accepted(changes):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    check_config(config, devices=8)


def numbers(config):
    """Names of the numeric settings; placeholders hold a number once they are set."""
    values = flat(config.to_dict())
    kinds = {name: config.get_type(name) if "." not in name else type(value) for name, value in values.items()}
    return {
        name
        for name, value in values.items()
        if kinds[name] in (int, float)
        or (isinstance(value, tuple) and value and not isinstance(value[0], str))
        or kinds[name] is tuple
    }


def test_every_number_of_a_recipe_has_a_range():
    assert set(LIMITS) == numbers(recipes.get_config("default"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_number_of_a_protocol_has_a_range(protocol):
    module = PROTOCOLS[protocol]
    config = module.default_config()
    assert numbers(config) == set(module.LIMITS)
    check_numbers(config, module.LIMITS)
    for name in module.LIMITS:
        value = config[name]
        if isinstance(value, float) or (isinstance(value, tuple) and isinstance(value[0], float)):
            for bad in (INF, -INF, NAN):
                broken = module.default_config()
                broken[name] = (bad,) if isinstance(value, tuple) else bad
                with pytest.raises(UserError, match=f"--config.{name}"):
                    check_numbers(broken, module.LIMITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.optim.__delitem__("lr"), "the recipe lacks optim.lr"),
        (lambda config: config.__delitem__("crops"), "the recipe lacks crops"),
        (lambda config: config.loss_weights.__delitem__("dino"), "the recipe lacks loss_weights.dino"),
        (lambda config: config.loss_weights.__setitem__("other", 1.0), "unknown setting loss_weights.other"),
        (lambda config: config.evals.__setitem__("rankme", {"every_epochs": 1}), "unknown setting evals.rankme"),
        (lambda config: config.__setitem__("momentum", 0.9), "unknown setting momentum"),
    ],
)
def test_a_recipe_of_ones_own_with_other_settings_is_refused_by_their_names(change, message):
    config = tiny_config()
    with config.unlocked():
        change(config)
    with pytest.raises(UserError, match=message):
        check_config(config, devices=8)


def test_a_recipe_may_leave_evaluations_out():
    config = tiny_config()
    with config.unlocked():
        del config.evals["knn"]
    check_config(config, devices=8)
