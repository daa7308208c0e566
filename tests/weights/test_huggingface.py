import json

import jax
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.weights import huggingface, official, tensor_files

CARD = {
    "architecture": {"arch": "vit_nano", "patch_size": 8, "in_channels": 3, "image_size": 32, "embed_dim": 64},
    "preprocessing": {
        "resize": 48,
        "crop": 40,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.1, 0.2, 0.3],
        "interpolation": "bicubic",
    },
}

# As saved by transformers, with one official name each: its third of qkv for a query, key or value.
ON_DISK = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
} | {
    f"encoder.layer.{layer}.{theirs}.{kind}": f"blocks.{layer}.{ours}.{kind}"
    for layer in range(3)
    for kind in ("weight", "bias")
    for theirs, ours in {
        "layernorm_before": "norm1",
        "attention.attention.query": "attn.qkv",
        "attention.attention.key": "attn.qkv",
        "attention.attention.value": "attn.qkv",
        "attention.output.dense": "attn.proj",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }.items()
}
IN_MEMORY = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def in_memory(name):
    for theirs, ours in IN_MEMORY.items():
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope="module")
def backbone():
    """Random tensors of a vit_nano by official name."""
    shapes = official.backbone_like(CARD["architecture"])
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes["params"])
    return official.to_official(tree)


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_names_on_disk_are_those_of_transformers(backbone):
    theirs = huggingface.from_official(backbone)
    assert theirs.keys() == ON_DISK.keys()
    for name, ours in ON_DISK.items():
        third = {"query": slice(64), "key": slice(64, 128), "value": slice(128, 192)}.get(name.split(".")[-2])
        expected = backbone[ours][third] if third else backbone[ours]
        np.testing.assert_array_equal(theirs[name], expected, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("rename", [str, in_memory])
def test_all_their_names_come_back_bit_by_bit(backbone, prefix, rename):
    theirs = {prefix + rename(name): tensor for name, tensor in huggingface.from_official(backbone).items()}
    assert huggingface.is_huggingface(theirs)
    assert_same(huggingface.to_official(theirs), backbone)


def test_what_is_no_part_of_a_backbone_keeps_its_name(backbone):
    more = {
        name: np.ones(2) for name in ("pooler.dense.weight", "vit.pooler.dense.bias", "classifier.weight", "", "\n")
    }
    assert_same(huggingface.to_official(huggingface.from_official(backbone) | more), backbone | more)


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_third_of_qkv_that_is_missing_makes_qkv_missing(backbone, part):
    theirs = huggingface.from_official(backbone)
    del theirs[f"encoder.layer.1.attention.attention.{part}.bias"]
    assert backbone.keys() - huggingface.to_official(theirs).keys() == {"blocks.1.attn.qkv.bias"}


def test_official_names_are_not_taken_for_theirs(backbone):
    assert not huggingface.is_huggingface(backbone)
    assert not huggingface.is_huggingface(f"module.backbone.{name}" for name in backbone)


def test_a_folder_holds_the_tensors_and_what_the_card_says(backbone, tmp_path):
    folder = tmp_path / "folder"
    huggingface.write_folder(folder, backbone, CARD)
    assert_same(huggingface.to_official(tensor_files.read(folder / "model.safetensors")), backbone)
    assert huggingface.read_folder_settings(folder) == {
        "num_attention_heads": 4,
        "preprocessing": {key: CARD["preprocessing"][key] for key in ("resize", "crop", "mean", "std")},
    }


def test_a_folder_is_whole_or_not_there(backbone, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write", full)
        with pytest.raises(UserError, match="can't write .*folder"):
            huggingface.write_folder(tmp_path / "folder", backbone, CARD)
    assert not (tmp_path / "folder").exists()
    huggingface.write_folder(tmp_path / "folder", backbone, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_convnet_has_no_such_folder(tmp_path):
    card = CARD | {"architecture": CARD["architecture"] | {"arch": "resnet50"}}
    with pytest.raises(UserError, match="resnet50: use --to=timm"):
        huggingface.write_folder(tmp_path / "folder", {}, card)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": 224, "do_resize": True, "resample": 2}, {"resize": 224, "crop": 224}),
        ({"size": {"height": 224, "width": 256}}, {"resize": 224, "crop": 224}),
        ({"size": [256, 224]}, {"resize": 224, "crop": 224}),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, {"resize": 256, "crop": 224}),
        (
            {"size": {"shortest_edge": 256, "longest_edge": None}, "crop_size": {"height": 224, "width": 224}}
            | {"do_center_crop": True, "image_mean": [0.5], "image_std": [0.2]},
            {"resize": 256, "crop": 224, "mean": [0.5], "std": [0.2]},
        ),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, {"resize": 256, "crop": 256}),
        ({"size": None, "image_mean": [0.5], "image_std": [0.2]}, {"mean": [0.5], "std": [0.2]}),
        ({"do_normalize": False, "image_mean": [0.5], "image_std": [0.2]}, {"mean": [0.0], "std": [1.0]}),
    ],
)
def test_preprocessing_is_read_in_its_common_forms(tmp_path, processor, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert huggingface.read_folder_settings(tmp_path) == {"preprocessing": expected}


def test_a_folder_without_settings_says_nothing(tmp_path):
    assert huggingface.read_folder_settings(tmp_path) == {}


@pytest.mark.parametrize("content", ["{", "[1]", "3", "\udcff"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        huggingface.read_folder_settings(tmp_path)


def test_another_activation_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "quick_gelu"}))
    with pytest.raises(UserError, match="quick_gelu"):
        huggingface.read_folder_settings(tmp_path)
