"""The trainer as a user runs it: any number of devices and hosts, resume, what it leaves behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config

from dino_jax import load_backbone, train_loop
from dino_jax.errors import UserError

ROOT = Path(__file__).parent.parent
STEPS = 60
TINY = [  # tiny_config() as flags, but longer
    "--config=configs/demo.py",
    "--config.batch_size=16",
    "--config.epochs=12",  # of 5 steps
    "--config.log_every=1",
    "--config.head.out_dim=64",
    "--config.head.hidden_dim=32",
    "--config.head.bottleneck_dim=16",
    "--config.crops.local_number=2",
    "--config.data.source=demo:train:8",
    "--config.eval.knn_every_epochs=0",
    "--config.checkpoint.every_steps=4",
]


def start(workdir, *flags, devices=1):
    """train.py in a process of its own."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "train.py", *TINY, f"--workdir={workdir}", *flags]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **output)


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def final_arrays(workdir):
    import orbax.checkpoint as ocp

    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    with ocp.PyTreeCheckpointer() as checkpointer:
        return steps[-1], jax.tree.leaves(checkpointer.restore(workdir / "checkpoints" / str(steps[-1]) / "state"))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A finished run on one device."""
    workdir = tmp_path_factory.mktemp("one")
    output = finish(start(workdir))
    return workdir, output


def test_leaves_what_it_promises(one_device):
    workdir, output = one_device
    assert (workdir / "config.json").exists()
    assert list((workdir / "tensorboard").iterdir())
    assert sorted(losses(workdir)) == list(range(2, STEPS + 1))  # the first step is compilation, reported by itself
    assert re.search(r"step 60/60 .*loss \d.*images/s.*data wait.*ETA", output)
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {"teacher_entropy", "kl", "mean_target_entropy", "center_norm", "grad_norm", "param_norm", "lr"}
    expected |= {"weight_decay", "teacher_momentum", "teacher_temp", "student_temp", "images_per_second", "data_wait"}
    assert expected <= set(line)
    assert load_backbone(workdir).card["provenance"]["step"] == STEPS


@pytest.mark.parametrize(("devices", "accum_steps"), [(8, 1), (4, 2)])
def test_same_losses_on_many_devices(one_device, tmp_path, devices, accum_steps):
    """However the batch is split, over devices or in time: the same images with the same crops, the same curve."""
    finish(start(tmp_path, f"--config.accum_steps={accum_steps}", devices=devices))
    assert losses(tmp_path) == pytest.approx(losses(one_device[0]), rel=1e-5)


def test_same_losses_in_2_processes(one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = [f"--config.distributed.coordinator=localhost:{port}", "--config.distributed.num_processes=2"]
    processes = [start(tmp_path, *shared, f"--config.distributed.process_id={i}", devices=2) for i in range(2)]
    for process in processes:
        finish(process)
    assert losses(tmp_path) == pytest.approx(losses(one_device[0]), rel=1e-5)


def wait_for_checkpoint(workdir, process, after=0, timeout=200):
    """Until the run has a finished checkpoint of a later step than `after`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.name.isdigit() and int(path.name) > after for path in workdir.glob("checkpoints/*")):
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint in time" if process.poll() is None else process.stdout.read())


def test_killed_run_resumes_bit_identically(one_device, tmp_path):
    process = start(tmp_path)
    wait_for_checkpoint(tmp_path, process)
    process.kill()
    process.communicate()
    resumed_after = int(re.search(r"resuming after step (\d+)", finish(start(tmp_path)))[1])
    assert 0 < resumed_after < STEPS
    step, resumed = final_arrays(tmp_path)
    reference_step, reference = final_arrays(one_device[0])
    assert step == reference_step == STEPS
    for ours, theirs in zip(resumed, reference, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(set(logged))
    reference_losses = losses(one_device[0])
    assert all(loss == reference_losses[step] for step, loss in losses(tmp_path).items())


def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    process = start(tmp_path, "--config.epochs=400")
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    stopped = int(re.search(r"stopped by a signal after step (\d+)", output)[1])
    assert final_arrays(tmp_path)[0] == stopped
    process = start(tmp_path, "--config.epochs=400")
    wait_for_checkpoint(tmp_path, process, after=stopped)
    process.kill()
    assert f"resuming after step {stopped}" in process.communicate()[0]


def test_knn_while_training(tmp_path, capsys):
    config = tiny_config(eval__train="demo:train:4", eval__test="demo:test:2", eval__k=5, eval__knn_every_epochs=1)
    train_loop.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn_top1_teacher" in line] == [0, 5, 10]
    assert all(0 <= line["knn_top1_student"] <= 100 for line in lines if "knn_top1_student" in line)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__arch": "resnet18", "optim__name": "lars", "crops__local_number": 0},
        {"head__use_bn": True, "optim__name": "sgd", "accum_steps": 2, "model__remat": True},
        {"dino__teacher_update": "epoch", "model__drop_path_rate": 0.2, "dtype": "bfloat16"},
        {"dino__centering": False, "dino__sharpening": False, "dino__teacher_update": "copy"},
    ],
    ids=["resnet", "bn-sgd-accum-remat", "epoch-droppath-bf16", "collapsing"],
)
def test_variants_train(tmp_path, changes):
    state = train_loop.train(tiny_config(epochs=2, log_every=5, **changes), tmp_path)
    assert int(state.step) == 10
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    same = jax.tree.leaves(jax.tree.map(np.array_equal, state.student, state.teacher))
    assert all(same) == (changes.get("dino__teacher_update") in ("epoch", "copy"))  # after the last step of an epoch
    assert bool((state.center == 0).all()) == (not changes.get("dino__centering", True))


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(optim__lr=1e30, optim__warmup_epochs=0, optim__clip_grad=0.0)
    with pytest.raises(UserError, match=r"loss is nan at step \d+.*checkpoint is kept.*demo"):
        train_loop.train(config, tmp_path)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]  # nothing broken was saved


def test_checkpoint_of_another_architecture_is_refused(one_device):
    before = (one_device[0] / "config.json").read_text()
    with pytest.raises(UserError, match="model.patch_size is 4, there 8"):
        train_loop.train(tiny_config(model__patch_size=4), one_device[0])
    assert (one_device[0] / "config.json").read_text() == before


def test_undecodable_images_are_named_counted_and_limited(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(31):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i:02}.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    few = {"data__source": f"folder:{folder}", "epochs": 2, "data__workers": 0}
    train_loop.train(tiny_config(**few, data__max_bad_fraction=0.1), tmp_path / "a")
    assert "cannot decode broken.jpg: another image stands in for it (1 so far)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 of 32 images cannot be decoded.*max_bad_fraction.*broken.jpg"):
        train_loop.train(tiny_config(**few, data__max_bad_fraction=0.01), tmp_path / "b")
