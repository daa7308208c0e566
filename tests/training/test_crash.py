"""Runs that are killed or stopped: real processes, real signals."""

import json
import re
import signal

import pytest
from processes import HELD, Held, train
from tiny import KNN, tiny_flags

from benchmarks import chaos
from dino_jax import checkpoints
from dino_jax.distributed.preemption import CUT_OFF
from dino_jax.errors import Stopped
from dino_jax.training.writers import read_metrics

EPOCHS, STEPS = 12, 60
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was never killed, `reference`, beside one that was killed three times: (report, folder)."""
    folder = tmp_path_factory.mktemp("chaos") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
        return chaos.run(kills=3, seed=0, folder=folder, arguments=tiny_flags(epochs=EPOCHS)[1:]), folder


def test_a_run_that_is_killed_3_times_ends_with_the_same_bits(killed):
    report, folder = killed
    assert report.kills == 3
    assert {"student", "teacher", "center", "opt_state"} <= set(report.digests)
    assert report.digests == report.reference_digests
    assert chaos.last_saved(folder / "killed") == chaos.last_saved(folder / "reference") == STEPS
    assert not report.left_over
    assert report.good


def test_a_killed_run_resumes_and_logs_each_step_once(killed):
    """With the losses of the run that was never killed."""
    _, folder = killed
    resumed_after = re.findall(r"resuming after step (\d+)", (folder / "killed.log").read_text())
    assert resumed_after
    assert all(0 < int(step) < STEPS for step in resumed_after)
    logged = [row["step"] for row in read_metrics(folder / "killed" / "metrics.jsonl") if "health" not in row]
    assert len(logged) == len(set(logged))
    assert losses(folder / "killed") == losses(folder / "reference")


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


PHASES = {  # the function in which the signal comes, the call of it, the step saved then, changes
    "evaluation": ("dino_jax.evals.knn:knn_accuracy", 3, 5, KNN),  # the first two are those of step 0
    "saving": ("dino_jax.checkpoints:save", 2, 8, {}),
    "writing": ("dino_jax.checkpoints.manager:write_manifest", 2, 8, {}),  # in Orbax's thread
    "start": ("dino_jax.training.loop:Run.compile", 1, 0, {}),
}


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_saves_and_exits_with_75_in_any_phase(tmp_path, phase):
    function, call, step, changes = PHASES[phase]
    held = Held(tmp_path / "run", function, call, epochs=EPOCHS, **changes)
    held.wait()
    held.process.end(signal.SIGTERM)
    held.release()
    assert held.process.popen.wait(timeout=chaos.LONGEST) == Stopped.exit_code, held.process.output
    saved = checkpoints.newest_intact(tmp_path / "run" / "checkpoints") or 0
    assert f"stopped by a signal after step {saved}: the same command resumes here" in held.process.output
    assert held.process.last_step == saved
    if phase == "writing":  # steps go on meanwhile
        assert saved >= step
    else:
        assert saved == step


def test_sigterm_in_a_step_saves_and_the_same_command_resumes(tmp_path):
    held = Held(tmp_path / "run", "dino_jax.training.loop:Run.step", call=6, epochs=EPOCHS)
    held.wait()
    held.process.end(signal.SIGTERM)
    held.release()
    assert "stopped by a signal after step 6: the same command resumes here" in held.process.finish(Stopped.exit_code)
    assert held.process.last_step == chaos.last_saved(tmp_path / "run") == 6
    assert "resuming after step 6" in train(tmp_path / "run", epochs=EPOCHS).finish()
    assert chaos.last_saved(tmp_path / "run") == STEPS


def test_sigterm_while_the_compiler_works_does_not_wait_for_it(tmp_path):
    """Python runs no handler of signals then."""
    place = {"HOLD": "dino_jax.training.loop:compile_lowered:1", "REACHED": str(tmp_path / "reached")}
    process = train(tmp_path / "run", program=HELD, env=place, checkpoint__stop_within=1)
    process.wait_for_file(tmp_path / "reached")
    process.end(signal.SIGTERM)
    assert process.popen.wait(timeout=chaos.LONGEST) == CUT_OFF, process.output
    assert "stopped by a signal, cut off after 1 s" in process.output


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_while_no_image_comes(tmp_path, workers):
    process = train(tmp_path / "run", program=HELD, env={"DEMO_EPOCHS": "1"}, epochs=EPOCHS, data__workers=workers)
    process.wait_for("phase data 6")
    process.end(signal.SIGTERM)
    assert process.popen.wait(timeout=chaos.LONGEST) == Stopped.exit_code, process.output
    assert checkpoints.newest_intact(tmp_path / "run" / "checkpoints") == 5
    assert "stopped by a signal after step 5" in process.output
