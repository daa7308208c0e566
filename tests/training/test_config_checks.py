"""A user's mistake is one clear line with the way out and exit code 2, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config

from dino_jax.errors import UserError
from dino_jax.training import loop
from dino_jax.training.config_checks import check_config

ROOT = Path(__file__).parents[2]

RESNET = {"model__arch": "resnet18", "model__drop_path_rate": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__arch": "vit_huge"},
            r"model.arch 'vit_huge' is unknown: set --config.model.arch to .*vit_small",
        ),
        ({"optim__name": "adam"}, r"optim.name 'adam' is unknown.*adamw"),
        ({"dino__teacher_update": "never"}, r"dino.teacher_update.*ema, epoch, copy"),
        ({"dtype": "float16"}, r"dtype 'float16' is unknown"),
        ({"batch_size": 100}, r"batch 100 does not divide over 8 devices: set --config.batch_size to 96 or 104"),
        ({"batch_size": 4}, r"batch 4 does not divide over 8 devices: set --config.batch_size to 8"),
        ({"accum_steps": 4}, r"batch 16 does not divide over 8 devices x 4 accum_steps.* to 32"),
        ({"batch_size": 0}, r"batch_size is 0: set --config.batch_size to 1 or more"),
        ({"crops__global_size": 30}, r"crops.global_size 30 is not a multiple of the patch size 8.* to 24 or 32"),
        ({"crops__local_size": 4}, r"crops.local_size 4 is not a multiple of the patch size 8.* to 8 or 16"),
        ({"eval__crop": 39}, r"eval.crop 39 is not a multiple of the patch size 8"),
        ({"model__in_channels": 3}, r"data.mean has 1 values for model.in_channels=3"),
        ({"optim__warmup_epochs": 2}, r"optim.warmup_epochs 2 is not shorter than the run of 2 epochs"),
        ({"model__arch": "resnet18", "model__drop_path_rate": 0.1}, r"resnet18 has no drop path"),
        ({"data__source": ""}, r"data.source is not set"),
        ({"seed": -1}, r"seed is -1: set --config.seed to 0 or more"),
        ({"crops__global_scale": (0.4,)}, r"crops.global_scale has 1 values"),
        ({"crops__local_scale": (0.4, 0.1)}, r"crops.local_scale is \(0.4, 0.1\).*a smaller"),
        ({"crops__global_blur": (1.0,)}, r"crops.global_blur has 1 values: .* to two"),
        ({"crops__flip": 50.0}, r"crops.flip is 50.0: set --config.crops.flip to at most 1"),
        ({"crops__local_number": -1}, r"crops.local_number is -1: set --config.crops.local_number to 0 or more"),
        ({"data__canvas_size": 0}, r"data.canvas_size is 0"),
        ({"data__std": (0.0,)}, r"data.std is \(0.0,\).*above 0"),
        ({"dino__student_temp": 0.0}, r"dino.student_temp is 0.0: set --config.dino.student_temp to 0.0001 or more"),
        ({"model__drop_path_rate": 1.0}, r"model.drop_path_rate is 1: set .* below 1"),
        ({"eval__crop": 48}, r"eval.crop 48 is larger than eval.resize 32: set --config.eval.resize to 48 or more"),
        ({"model__arch": "resnet18", "model__remat": True}, r"resnet18 has no rematerialization"),
        ({"model__arch": "resnet18", "model__unroll": True}, r"resnet18 has no loop"),
        ({"model__remat": True, "model__unroll": True}, r"model.remat needs the loop"),
        ({"model__attention": "flash"}, r"model.attention 'flash' is unknown.*xla, cudnn"),
        ({"model__attention": "cudnn"}, r"Ampere or newer, not cpu: set --config.model.attention=xla"),
        ({"model__arch": "resnet18", "model__attention": "cudnn"}, r"resnet18 has no attention"),
        ({"checkpoint__keep_last": 0}, r"checkpoint.keep_last is 0"),
        ({"fsdp": 3}, r"fsdp 3 does not divide 8 devices: set --config.fsdp to a divisor"),
        ({"optim__lr": float("nan")}, r"optim.lr is nan: set --config.optim.lr to a finite number"),
        ({"optim__weight_decay": -1.0}, r"optim.weight_decay is -1.0"),
        ({"optim__max_skipped": -1}, r"optim.max_skipped is -1"),
        (
            {"dino__teacher_momentum": 1.5},
            r"dino.teacher_momentum is 1.5: set --config.dino.teacher_momentum to at most 1",
        ),
        ({"data__max_bad_fraction": 2.0}, r"data.max_bad_fraction is 2.0"),
        ({"data__stall_timeout": -1.0}, r"data.stall_timeout is -1.0"),
        ({"crops__global_scale": (0.5, 2.0)}, r"crops.global_scale is \(0.5, 2.0\).*at most 1"),
        ({"crops__hue": -0.1}, r"crops.hue is -0.1"),
        ({"distributed__num_processes": 0}, r"distributed.num_processes is 0"),
        ({"distributed__heartbeat": 0}, r"distributed.heartbeat is 0"),
        ({"watchdog__seconds": -1}, r"watchdog.seconds is -1"),
        ({"verify_every": -1}, r"verify_every is -1"),
        ({"model__registers": -1}, r"model.registers is -1: set --config.model.registers to 0 or more"),
        ({"model__layer_scale": -1e-5}, r"model.layer_scale is -1e-05: set --config.model.layer_scale to 0 or more"),
        ({"model__ffn": "glu"}, r"model.ffn 'glu' is unknown: set --config.model.ffn to one of mlp, swiglu"),
        (RESNET | {"model__registers": 4}, r"resnet18 has no registers: set --config.model.registers=0"),
        (RESNET | {"model__layer_scale": 1e-5}, r"resnet18 has no LayerScale: set --config.model.layer_scale=0"),
        (RESNET | {"model__ffn": "swiglu"}, r"resnet18 has no feed-forward.*: set --config.model.ffn=mlp"),
        (RESNET | {"model__antialias": True}, r"resnet18 has no positions.*: set --config.model.antialias=False"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(**changes), devices=8)


def test_settings_that_work_pass():
    check_config(tiny_config(), devices=8)
    check_config(tiny_config(crops__local_number=0, crops__local_size=5), devices=8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder:{tmp}/nowhere", "nowhere"),
        ("folder:{tmp}", "no images"),
        ("demo:train:1", "10 images, fewer than a batch of 16: set --config.batch_size to 10 or less"),
        ("photos", "expected folder:PATH"),
    ],
)
def test_data_sources(tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        loop.train(tiny_config(data__source=source.format(tmp=tmp_path)), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optim.lrr=1"], '"lr" instead of "lrr"'),
        (["--config.optim.lr=fast"], "--config.optim.lr=fast"),
        (["--config=configs/nope.py"], "configs/nope.py"),
        (["--workdri=x"], "workdir"),
        (["--config=configs/vits16.py"], "--workdir is missing"),
        (["--config=configs/vits16.py", "--workdir={tmp}"], "data.source is not set"),
        (["train"], "'train' is not a flag"),
        (["--config=configs/demo.py", "--workdir=README.md"], "can't write to --workdir=README.md"),
        (["--config=configs/demo.py", "--workdir={tmp}", "--config.distributed.num_processes=2"], "=HOST:PORT"),
    ],
)
def test_command_line(tmp_path, flags, message):
    command = [sys.executable, "train.py", *(flag.format(tmp=tmp_path) for flag in flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_every_recipe_is_sound():
    """Each config loads, is locked, and passes the checks on the number of devices that its batch is meant for."""
    import importlib

    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem == "__init__":
            continue
        config = importlib.import_module(f"configs.{path.stem}").get_config()
        assert config.is_locked
        config.data.source = config.data.source or "folder:somewhere"
        check_config(config, devices=16 if config.batch_size >= 512 else 1)
