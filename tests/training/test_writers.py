import itertools
import json
import re
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from dino_jax.errors import UserError
from dino_jax.training.writers import Logger, RunInfo, format_duration, read_metrics


def open_logger(workdir, total_steps, steps_per_epoch, start_step=0, writers="console,jsonl,tensorboard"):
    return Logger(RunInfo(workdir, ConfigDict({"writers": writers}), total_steps, steps_per_epoch, start_step))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_log_writes_json_tensorboard_and_a_progress_line(tmp_path, capsys):
    logger = open_logger(tmp_path, 6000, 375)
    scalars = {"loss": jnp.float32(5.1234), "images_per_second": 612.3, "data_wait": 0.004, "lr": 1e-3}
    logger.log(1000, scalars)  # the pace until here was compilation
    assert capsys.readouterr().out.endswith("ETA ?\n")
    logger.log(1200, scalars)
    logger.__exit__()
    assert lines(tmp_path)[1] == {"step": 1200, **scalars, "loss": pytest.approx(5.1234)}
    assert list((tmp_path / "tensorboard").glob("events*"))
    pattern = r"step 1,200/6,000  epoch 3\.2  loss 5\.123  612 images/s  data wait 0\.4%  ETA \d+:\d\d\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


def test_scalars_without_a_loss_are_all_shown(tmp_path, capsys):
    logger = open_logger(tmp_path, 10, 5)
    logger.log(5, {"knn_top1": 81.25})
    logger.__exit__()
    assert capsys.readouterr().out == "step 5/10  epoch 1.0  knn_top1 81.25\n"


def test_pictures_become_files_and_events_and_no_row(tmp_path):
    logger = open_logger(tmp_path, 10, 5)
    image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    logger.log(5, {"neighbors": image})
    logger.log(5, {"attention": image, "loss": 1.0})
    logger.__exit__()
    for name in ("neighbors", "attention"):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"pictures/{name}-000000005.png")), image)
    assert lines(tmp_path) == [{"step": 5, "loss": 1.0}]
    [events] = (tmp_path / "tensorboard").glob("events*")
    assert b"pictures/neighbors" in events.read_bytes()


def test_a_loss_that_is_not_finite_keeps_the_json_valid(tmp_path):
    logger = open_logger(tmp_path, 10, 5)
    logger.log(1, {"loss": np.nan})
    logger.__exit__()
    assert lines(tmp_path) == [{"step": 1, "loss": None}]


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    logger = open_logger(tmp_path, 10, 5)
    for step in range(1, 6):
        logger.log(step, {"loss": step})
    logger.__exit__()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    logger = open_logger(tmp_path, 10, 5, start_step=3)
    logger.log(4, {"loss": 40})
    logger.__exit__()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_lines_that_are_not_of_a_run_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[]\n3\nnull\n{"loss": 1}\n{"step": "2"}\n\xff\xfe\n{"step": 3, "loss": null}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 3, "loss": None}]
    open_logger(tmp_path, 10, 5, start_step=2).__exit__()
    assert path.read_text() == '{"step": 1}\n'


def shown_by_tensorboard(workdir):
    """Steps that TensorBoard shows: a START of a session drops the events of its step and later ones."""
    steps = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")  # of the record, between two checksums
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.HasField("session_log"):
                steps = [step for step in steps if step < event.step]
            if event.HasField("summary"):
                steps.append(event.step)
    return steps


def test_restarts_leave_each_step_once(tmp_path, monkeypatch):
    """Three starts from 0, which evaluate before step 1, and one that resumes."""
    monkeypatch.setattr(time, "time", map(float, itertools.count()).__next__)  # names of files have whole seconds
    for start in (0, 0, 0, 2):
        logger = open_logger(tmp_path, 10, 5, start_step=start)
        for step in range(start + 1 if start else 0, 4):
            logger.log(step, {"loss": step})
        logger.__exit__()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert shown_by_tensorboard(tmp_path) == [0, 1, 2, 3]


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    logger = open_logger(tmp_path, 10, 5)
    logger.log(1, {"loss": 1.0})
    logger.info("hello")
    logger.__exit__()
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (432, "7:12"), (3605, "1:00:05"), (360000, "100:00:00")])
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_a_full_disk_ends_the_log_with_one_line_and_does_not_hang(tmp_path, capsys):
    """As a full disk, a quota stops a file in its middle; capsys because pytest's own capture is a file, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = open_logger(tmp_path, 1000, 10)

    def log_for_ever():
        for step in range(10_000):
            logger.log(step, {"loss": 1.0})

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(UserError, match=f"can't write {tmp_path}"):
            log_for_ever()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stored_by_wandb(path):
    """The rows of the history and the summary in a small .wandb file: a LevelDB log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    def values(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    history, summary, data = [], {}, path.read_bytes()[7:]  # after the header of the file
    while data:
        size = int.from_bytes(data[4:6], "little")  # of the record, after a checksum; its type follows
        record, data = Record.FromString(data[7 : 7 + size]), data[7 + size :]
        if record.HasField("history"):
            history.append(values(record.history.item))
        if record.HasField("summary"):
            summary |= values(record.summary.update)
    return history, summary


def test_wandb_logs_offline_under_one_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for start in (0, 2):  # a run, and its continuation
        time.sleep(1.1)  # wandb names the folders of a run and of its continuation by the second
        logger = open_logger(tmp_path, 10, 5, start_step=start, writers="wandb")
        logger.log(start + 1, {"loss": 1.5, "lr": 0.1})
        logger.__exit__()
    assert wandb.run is None
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.stem for path in files}) == 1  # the id, which joins them
    for step, path in zip((1, 3), files, strict=True):
        [row], summary = stored_by_wandb(path)
        assert (row["_step"], row["loss"], row["lr"]) == (step, 1.5, 0.1)
        assert (summary["_step"], summary["loss"]) == (step, 1.5)


def test_without_wandb_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'dino_jax\[wandb\]'"):
        open_logger(tmp_path, 10, 5, writers="wandb")
