"""The trainer as a user runs it: any number of devices and hosts, resume, what it leaves behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import tiny_config

from dino_jax import load_backbone
from dino_jax.errors import UserError
from dino_jax.training import loop

ROOT = Path(__file__).parents[2]
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
    "--config.evals.knn.every_epochs=0",
    "--config.checkpoint.every_steps=4",
]


KNN = [
    "--config.evals.knn.every_epochs=12",
    "--config.evals.knn.train=demo:train:4",
    "--config.evals.knn.test=demo:test:2",
    "--config.evals.knn.k=5",
]


def start(workdir, *flags, devices=1):
    """train.py in a process of its own."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "train.py", *TINY, f"--workdir={workdir}", *flags]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **output)


def finish(process, timeout=300, code=0):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, output
    return output


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def last_step(workdir):
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


def last_arrays(workdir):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return jax.tree.leaves(checkpointer.restore(workdir / "checkpoints" / str(last_step(workdir)) / "state"))


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
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
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


def test_same_losses_with_batch_norm_and_drop_path(tmp_path):
    """Statistics over the global batch and drop paths by position: they must not know about devices either."""
    flags = ["--config.head.use_bn=True", "--config.model.drop_path_rate=0.3", "--config.epochs=2"]
    finish(start(tmp_path / "1", *flags))
    finish(start(tmp_path / "4", *flags, devices=4))
    # Batch norm amplifies the rounding of its mean and variance from step to step: ten steps stay within 1e-4.
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


def start_two(workdir, *flags, own=([], [])):
    """Two processes of two devices each, with flags for both and for each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = [f"--config.distributed.coordinator=localhost:{port}", "--config.distributed.num_processes=2", *flags]
    return [start(workdir, *shared, f"--config.distributed.process_id={i}", *own[i], devices=2) for i in range(2)]


@pytest.mark.parametrize("fsdp", [1, 4])
def test_same_losses_in_2_processes(one_device, tmp_path, fsdp):
    for process in start_two(tmp_path, *KNN, f"--config.fsdp={fsdp}"):
        finish(process)
    assert losses(tmp_path) == pytest.approx(losses(one_device[0]), rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn_top1_teacher" in line] == [0, STEPS]


def test_sigterm_to_one_of_2_processes_stops_and_saves_both(tmp_path):
    processes = start_two(tmp_path, "--config.epochs=400")
    wait_for_checkpoint(tmp_path, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    stopped = re.search(r"stopped by a signal after step (\d+)", finish(processes[0], code=75))
    finish(processes[1], code=75)
    assert last_step(tmp_path) == int(stopped[1])


def test_processes_that_read_other_weights_end_together(one_device, tmp_path):
    """One finds nothing, or something else: replicas would differ without a word, or the others wait for ever."""
    other = tmp_path / "other"
    shutil.copytree(one_device[0] / "export", other)
    for there, said in ((tmp_path / "absent", "no such path"), (other, "do not see the same data")):
        own = ([f"--config.init_from={one_device[0]}"], [f"--config.init_from={there}"])
        first, second = start_two(tmp_path / said, own=own)
        output = second.communicate(timeout=120)[0]
        first.communicate(timeout=120)
        assert (first.returncode, second.returncode) == (2, 2), output
        assert said in output


def test_a_mistake_on_one_of_2_processes_ends_both(tmp_path):
    missing = ["--config.data.source=folder:/nowhere"]
    first, second = start_two(tmp_path, own=([], missing))
    output = second.communicate(timeout=120)[0]
    assert second.returncode == 2
    assert "/nowhere" in output
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 2
    assert "error: process 1 could not go on" in output


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
    assert last_step(tmp_path) == last_step(one_device[0]) == STEPS
    for ours, theirs in zip(last_arrays(tmp_path), last_arrays(one_device[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(set(logged))
    reference_losses = losses(one_device[0])
    assert all(loss == reference_losses[step] for step, loss in losses(tmp_path).items())


def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    process = start(tmp_path, "--config.epochs=400")
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=75)
    stopped = int(re.search(r"stopped by a signal after step (\d+)", output)[1])
    assert last_step(tmp_path) == stopped
    process = start(tmp_path, "--config.epochs=400")
    wait_for_checkpoint(tmp_path, process, after=stopped)
    process.kill()
    assert f"resuming after step {stopped}" in process.communicate()[0]


def test_knn_while_training(tmp_path, capsys):
    config = tiny_config(
        evals__knn__train="demo:train:4", evals__knn__test="demo:test:2", evals__knn__k=5, evals__knn__every_epochs=1
    )
    loop.train(config, tmp_path)
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
    state = loop.train(tiny_config(epochs=2, log_every=5, **changes), tmp_path)
    assert int(state.step) == 10
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    same = jax.tree.leaves(jax.tree.map(np.array_equal, state.student, state.teacher))
    assert all(same) == (changes.get("dino__teacher_update") in ("epoch", "copy"))  # after the last step of an epoch
    assert bool((state.center == 0).all()) == (not changes.get("dino__centering", True))


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(optim__lr=1e38, optim__warmup_epochs=0, optim__clip_grad=0.0, checkpoint__every_steps=1)
    with pytest.raises(UserError, match=r"_norm is (nan|inf) at step \d+.*is kept.*images: .*demo"):
        loop.train(config, tmp_path)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]  # nothing broken was saved


def test_checkpoint_of_another_architecture_is_refused(one_device):
    before = (one_device[0] / "config.json").read_text()
    with pytest.raises(UserError, match="model.patch_size is 4, there 8"):
        loop.train(tiny_config(model__patch_size=4), one_device[0])
    with pytest.raises(UserError, match="batch_size is 8, there 16"):
        loop.train(tiny_config(batch_size=8), one_device[0])
    assert (one_device[0] / "config.json").read_text() == before


def test_finished_run_exports_again(one_device):
    workdir = one_device[0]
    before = load_backbone(workdir)
    shutil.rmtree(workdir / "export")
    assert load_backbone(workdir).card["provenance"]["step"] == STEPS  # of the checkpoint
    assert "nothing left to train" in finish(start(workdir))
    after = load_backbone(workdir / "export")
    same = jax.tree.map(np.array_equal, before.variables, after.variables)
    assert all(jax.tree.leaves(same))


def test_undecodable_images_are_named_counted_and_limited(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(31):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i:02}.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    few = {"data__source": f"folder:{folder}", "epochs": 2, "data__workers": 0}
    loop.train(tiny_config(**few, data__max_bad_fraction=0.1), tmp_path / "a")
    assert "cannot decode broken.jpg: another image stands in for it (1 so far)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 of 32 images cannot be decoded.*max_bad_fraction.*broken.jpg"):
        loop.train(tiny_config(**few, data__max_bad_fraction=0.01), tmp_path / "b")
