"""Labels from a CSV file."""

import pickle

import pytest
from PIL import Image

from dino_jax.data.sources import open_source
from dino_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    for name in ("a.png", "b.png", "sub/c,d.png", "e.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / "photos" / name)
    return tmp_path


def labeled(folder, text, encoding="utf-8"):
    (folder / "labels.csv").write_text(text, encoding=encoding)
    return open_source(f"folder:{folder}/photos?labels={folder}/labels.csv")


def test_labels_go_to_the_names_and_unnamed_images_are_left_out(photos):
    source = labeled(photos, 'label,name,note\nowl,e.png,x\ncat,a.png,\nowl,"sub/c,d.png",y\n')
    assert [source.name(i) for i in range(len(source))] == ["a.png", "e.png", "sub/c,d.png"]
    assert [source.label(i) for i in range(3)] == [0, 1, 1] == [source[i].label for i in range(3)]
    assert source.class_names == ["cat", "owl"]
    assert source.num_classes == 2
    assert pickle.loads(pickle.dumps(source)).label(2) == 1


def test_several_labels_an_image(photos):
    source = labeled(photos, "name,label\na.png,owl;cat\nb.png,\ne.png,eel\n")
    assert source.class_names == ["cat", "eel", "owl"]
    assert source.label_sets == [[0, 2], [], [1]]
    assert [source.label(i) for i in range(3)] == [-1, -1, -1]
    assert source.num_classes == 0, "what takes one label an image has none here"
    assert source.identity(0) != source.identity(1)


def test_numbers_are_sorted_as_numbers(photos):
    assert labeled(photos, "name,label\na.png,10\nb.png,9\n").class_names == ["9", "10"]


def test_a_file_of_a_spreadsheet_with_a_byte_order_mark(photos):
    assert labeled(photos, "name,label\r\na.png,x\r\n", "utf-8-sig").class_names == ["x"]


def test_labels_and_a_number_of_images_of_each_class(photos):
    labeled(photos, "name,label\na.png,x\nb.png,x\ne.png,y\n")
    source = open_source(f"folder:{photos}/photos?labels={photos}/labels.csv:1")
    assert [source.name(i) for i in range(len(source))] == ["a.png", "e.png"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png,x\n", "no column name and label"),
        ("name,class\na.png,x\n", "no column label"),
        ("name,label\n", "are empty"),
        ("name,label\na.png,\n", "line 2 has no label"),
        ("name,label\na.png,x\na.png,y\n", "line 3 gives a.png a second label"),
        ("name,label\nA.png,x\n", "1 of its 1 names are not in the source, whose first is a.png"),
    ],
)
def test_mistakes_are_one_line(photos, text, words):
    with pytest.raises(UserError, match=words):
        labeled(photos, text)


def test_a_file_that_is_not_there_is_named(photos):
    with pytest.raises(UserError, match="none.csv cannot be read"):
        open_source(f"folder:{photos}/photos?labels=none.csv")
