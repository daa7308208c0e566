"""The trainer as a user runs it: any number of devices and hosts, resume, what it leaves behind."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image
from processes import SEVERAL, Held, Process, train, two_processes
from tiny import KNN, tiny_config

from dino_jax import load_backbone
from dino_jax.errors import Stopped, UserError
from dino_jax.training import loop
from dino_jax.training.writers import read_metrics

EPOCHS, STEPS = 12, 60
pytestmark = pytest.mark.slow


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def last_step(workdir):
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


def several(log, runs, devices):
    """Runs, (workdir, changes of the tiny config), one after the other in one process."""
    return Process(
        log, str(SEVERAL), json.dumps([(str(workdir), changes) for workdir, changes in runs]), devices=devices
    )


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A finished run on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    output = train(workdir, epochs=EPOCHS, writers="console,jsonl,tensorboard").finish()
    return workdir, output


def test_leaves_what_it_promises(one_device):
    workdir, output = one_device
    assert (workdir / "config.json").exists()
    assert list((workdir / "tensorboard").iterdir())
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
    assert re.search(r"step 60/60 .*loss \d.*images/s.*data wait.*ETA", output)
    line = next(row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] == STEPS and "loss" in row)
    expected = {"teacher_entropy", "kl", "mean_target_entropy", "center_norm", "grad_norm", "param_norm", "lr"}
    expected |= {"weight_decay", "teacher_momentum", "teacher_temp", "images_per_second", "data_wait"}
    assert expected <= set(line)
    assert load_backbone(workdir).card["provenance"]["step"] == STEPS


NORM_AND_DROP_PATH = {"head__use_bn": True, "model__drop_path_rate": 0.3}


@pytest.fixture(scope="module")
def four_devices(tmp_path_factory):
    """A folder with two finished runs on four devices: `accumulated` and, a short one, `norm_and_drop_path`."""
    folder = tmp_path_factory.mktemp("four")
    accumulated = (folder / "accumulated", {"epochs": EPOCHS, "accum_steps": 2})
    several(folder / "log", [accumulated, (folder / "norm_and_drop_path", NORM_AND_DROP_PATH)], devices=4).finish()
    return folder


def test_same_losses_on_eight_devices(one_device, tmp_path):
    train(tmp_path / "run", epochs=EPOCHS, devices=8).finish()
    assert losses(tmp_path / "run") == pytest.approx(losses(one_device[0]), rel=1e-5)


def test_same_losses_on_four_devices_in_two_parts(one_device, four_devices):
    """However the batch is split, over devices or in time: the same images with the same crops, the same curve."""
    assert losses(four_devices / "accumulated") == pytest.approx(losses(one_device[0]), rel=1e-5)


def test_same_losses_with_batch_norm_and_drop_path(four_devices, tmp_path):
    """Statistics over the global batch and drop paths by position: they must not know about devices either."""
    loop.train(tiny_config(**NORM_AND_DROP_PATH), tmp_path)
    # Batch norm amplifies the rounding of its mean and variance from step to step: ten steps stay within 1e-4.
    assert losses(four_devices / "norm_and_drop_path") == pytest.approx(losses(tmp_path), rel=1e-4)


@pytest.fixture(scope="module")
def together(one_device, tmp_path_factory):
    """What two processes of two devices each do in turn: (folder, [output of each]).

    First two runs in which process 1 finds nothing, or something else, in its `init_from`; then two that train, with
    parameters whole and in four parts.
    """
    folder = tmp_path_factory.mktemp("together")
    weights = one_device[0]
    shutil.copytree(weights / "export", folder / "others")
    sources = [{"absent": weights, "other": weights}, {"absent": folder / "nowhere", "other": folder / "others"}]

    def runs(me):
        for name, path in sources[me["distributed__process_id"]].items():
            yield folder / name, me | {"init_from": str(path)}
        for n in (1, 4):
            yield folder / f"fsdp{n}", me | KNN | {"evals__knn__every_epochs": EPOCHS, "fsdp": n}

    processes = [several(folder / f"log{i}", runs(me), devices=2) for i, me in enumerate(two_processes(epochs=EPOCHS))]
    return folder, [process.finish() for process in processes]


@pytest.mark.parametrize("fsdp", [1, 4])
def test_same_losses_in_2_processes(one_device, together, fsdp):
    folder, outputs = together
    assert all(f"fsdp{fsdp}: trained" in output for output in outputs)
    assert losses(folder / f"fsdp{fsdp}") == pytest.approx(losses(one_device[0]), rel=1e-5)
    lines = [json.loads(line) for line in (folder / f"fsdp{fsdp}" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn_top1_teacher" in line] == [0, STEPS]


@pytest.mark.parametrize(("run", "message"), [("absent", "no such path"), ("other", "do not see the same data")])
def test_processes_that_read_other_weights_end_together(together, run, message):
    """One finds nothing, or something else: replicas would differ without a word, or the others wait for ever."""
    first, second = (re.search(f"^{run}: (.*)$", output, re.MULTILINE)[1] for output in together[1])
    assert message in second
    assert first != "trained"


def test_sigterm_to_one_of_2_processes_stops_and_saves_both(tmp_path):
    """Whatever the period of logs, and although the steps are much faster than the agreement."""
    mine, theirs = two_processes(epochs=2_000, log_every=100_000, checkpoint__every_steps=1_000_000)
    first = train(tmp_path / "run", devices=2, **mine)
    held = Held(tmp_path / "run", "dino_jax.training.loop:Run.step", call=7, devices=2, **theirs)
    held.wait()
    held.process.end(signal.SIGTERM)
    held.release()
    stopped = re.search(r"stopped by a signal after step (\d+)", first.finish(Stopped.exit_code))
    held.process.finish(Stopped.exit_code)
    assert last_step(tmp_path / "run") == int(stopped[1])


def test_a_mistake_on_one_of_2_processes_ends_both(tmp_path):
    mine, theirs = two_processes()
    first = train(tmp_path / "run", devices=2, **mine)
    second = train(tmp_path / "run", devices=2, **(theirs | {"data__source": "folder:/nowhere"}))
    assert "/nowhere" in second.finish(2)
    assert "error: process 1 could not go on" in first.finish(2)


def test_knn_while_training(tmp_path):
    loop.train(tiny_config(**KNN), tmp_path)
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


def test_the_first_and_the_last_step_are_logged(tmp_path):
    loop.train(tiny_config(log_every=4), tmp_path)
    assert sorted(losses(tmp_path)) == [1, 4, 8, 10]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config(optim__lr=1e38, optim__warmup_epochs=0, optim__clip_grad=0.0, checkpoint__every_steps=1)
    with pytest.raises(UserError, match=r"_norm is (nan|inf) at step \d+.*is kept.*images: .*demo"):
        loop.train(config, tmp_path)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]  # nothing broken was saved


def test_checkpoint_of_another_architecture_is_refused(one_device):
    before = (one_device[0] / "config.json").read_text()
    with pytest.raises(UserError, match="model.patch_size is 4, was 8"):
        loop.train(tiny_config(model__patch_size=4), one_device[0])
    with pytest.raises(UserError, match="batch_size is 8, was 16"):
        loop.train(tiny_config(batch_size=8), one_device[0])
    assert (one_device[0] / "config.json").read_text() == before


def test_finished_run_exports_again(one_device, capsys):
    workdir = one_device[0]
    before = load_backbone(workdir)
    shutil.rmtree(workdir / "export")
    assert load_backbone(workdir).card["provenance"]["step"] == STEPS  # of the checkpoint
    loop.train(tiny_config(epochs=EPOCHS), workdir)
    assert "nothing left to train" in capsys.readouterr().out
    after = load_backbone(workdir / "export")
    same = jax.tree.map(np.array_equal, before.variables, after.variables)
    assert all(jax.tree.leaves(same))


def test_undecodable_images_are_named_counted_and_limited(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(79):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{i:02}.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    few = {"data__source": f"folder:{folder}"}
    loop.train(tiny_config(**few, data__max_bad_fraction=0.1), tmp_path / "a")
    assert "cannot decode broken.jpg: using another image instead (1 so far)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 of 80 images cannot be decoded.*max_bad_fraction.*broken.jpg"):
        loop.train(tiny_config(**few, data__max_bad_fraction=0.01), tmp_path / "b")
