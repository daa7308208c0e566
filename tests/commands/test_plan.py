import json
import subprocess
import sys

import pytest

from dino_jax.commands import plan
from dino_jax.commands.plan import Chip, Collective
from dino_jax.errors import UserError

PROGRAM = """HloModule step

%condition (x: (s32[])) -> pred[] {
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (x: (s32[])) -> (s32[]) {
  %gather = bf16[384,1536]{1,0} all-gather(%part), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  ROOT %tuple = (s32[]) tuple(%i)
}

%overlapped (x: f32[16]) -> f32[16] {
  ROOT %again = f32[32]{0} all-gather(%c), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}
}

%overlapped_too (x: f32[16]) -> f32[16] {
  ROOT %again = f32[32]{0} all-gather(%c), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[]) while(%start), condition=%condition, body=%body
  %sums = (f32[384]{0}, f32[10,384]{1,0}) all-reduce(%a, %b), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %begin = (f32[4]{0}, f32[16]{0}) all-gather-start(%c), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}
  %fused = f32[16]{0} fusion(%begin), calls=%overlapped
  %fused_too = f32[16]{0} fusion(%begin), calls=%overlapped_too
  ROOT %end = f32[16]{0} all-gather-done(%begin)
}
"""


def test_collectives_of_a_program_with_a_loop():
    found = list(plan.collectives(PROGRAM, 8))
    assert found == [
        Collective("all-gather", 2 * 384 * 1536, 12, 4),
        Collective("all-reduce", 4 * 11 * 384, 1, 8),
        Collective("all-gather", 4 * 16, 1, 8),
        Collective("all-gather", 4 * 32, 1, 8),
    ]


def test_times_are_those_of_rings():
    chip = Chip(memory=1, links=100.0, network=10.0)
    reduce = Collective("all-reduce", 400, 2, 8)
    # One slice of 8: twice 7/8 of it around the ring, two times.
    assert plan.link_seconds(reduce, chip, 8) == pytest.approx(2 * 2 * 400 * 7 / 8 / 100)
    assert plan.network_seconds(400, chip, 1, 8) == 0
    # Two slices of 4: 3/4 within; between them each chip's quarter, there and back half of it.
    assert plan.link_seconds(reduce, chip, 4) == pytest.approx(2 * 2 * 400 * 3 / 4 / 100)
    assert plan.network_seconds(400, chip, 2, 4) == pytest.approx(2 * 100 / 2 / 10)
    gather = Collective("all-gather", 400, 1, 4)
    assert plan.link_seconds(gather, chip, 8) == pytest.approx(400 * 3 / 4 / 100)
    assert plan.link_seconds(Collective("reduce-scatter", 100, 1, 4), chip, 4) == pytest.approx(400 * 3 / 4 / 100)


def test_images_that_fit_are_read_off_a_line_that_rises():
    assert plan.images_that_fit({8: 5.0, 4: 3.0}, memory=10.2, multiple=1) == 18
    assert plan.images_that_fit({8: 5.0, 4: 3.0}, memory=10.2, multiple=4) == 16
    assert plan.images_that_fit({8: 5.0, 4: 5.1}, memory=10.2, multiple=1) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--config.batch_size=8"],
        ["--config.batch_size=16", "--config.accum_steps=2", "--config.crops.local_number=2"],
    ],
)
def test_in_a_tpu_program_the_gradient_crosses_once(tmp_path, settings):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed: pip install libtpu")
    command = [
        sys.executable,
        "-m",
        "dino_jax",
        "plan",
        "--config=vits16",
        "--topology=v5e:2x4",
        *settings,
    ]
    command += ["--config.model.arch=vit_nano", "--config.head.out_dim=4096"]
    done = subprocess.run([*command, f"--output={tmp_path / 'plan.json'}"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    sums = found["collectives"]
    assert {one["operation"] for one in sums} == {"all-reduce"}
    assert sum(one["times"] for one in sums) <= 8
    # What is not gradient: the center, the mean of the targets, and three numbers.
    assert 4 * found["parameters"] <= sum(one["times"] * one["size"] for one in sums) <= 1.02 * 4 * found["parameters"]


def test_an_unknown_chip_is_named():
    with pytest.raises(UserError, match="v9:4x4: give CHIP:SHAPE with CHIP one of v5e"):
        plan.topology_mesh("v9:4x4", 1, 1)
