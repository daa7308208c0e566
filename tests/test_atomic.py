import errno
import os

import pytest

from dino_jax import atomic
from dino_jax.errors import UserError


def fill_up(path):
    """Writes something, then finds the disk full."""
    path.write_text("cut")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic.file(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists()
    with pytest.raises(UserError), atomic.file(path) as unfinished:
        fill_up(unfinished)
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder"
    for text in ("first", "second"):
        with atomic.folder(path) as unfinished:
            (unfinished / text).write_text(text)
    with pytest.raises(UserError), atomic.folder(path) as unfinished:
        fill_up(unfinished / "third")
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("kind", [atomic.file, atomic.folder])
def test_a_full_disk_is_one_line_that_names_path_and_way_out(tmp_path, kind):
    message = rf"can't write {tmp_path / 'a'} \(No space left on device\): go away$"
    with pytest.raises(UserError, match=message), kind(tmp_path / "a", "go away") as unfinished:
        fill_up(unfinished if kind is atomic.file else unfinished / "b")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_disk_in_the_words_of_orbax_count_and_others_do_not(tmp_path):
    with pytest.raises(UserError, match="No space left on device"), atomic.disk_errors(tmp_path):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 3 bytes: No space left [os_error_code='28']")
    with pytest.raises(ValueError, match="another"), atomic.disk_errors(tmp_path):
        raise ValueError("another")
