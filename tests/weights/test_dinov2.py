"""DINOv2's files in every form: training checkpoints, timm's names, Hugging Face folders, and our own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dino_jax
from dino_jax.commands import convert
from dino_jax.errors import UserError
from dino_jax.models import DINOHead
from dino_jax.models.registry import VARIANT, architecture_card
from dino_jax.weights import huggingface, load, official, tensor_files, timm

K = 32
KINDS = {
    "mlp": {"registers": 0, "ffn": "mlp"},
    "swiglu": {"registers": 0, "ffn": "swiglu"},
    "reg4": {"registers": 4, "ffn": "mlp"},
    "reg4_swiglu": {"registers": 4, "ffn": "swiglu"},
}


def random_tensors(module_like, seed):
    rng = np.random.default_rng(seed)
    return official.to_official(jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), module_like))


def card_of(kind, **changes):
    options = {"layer_scale": 1e-5, "mask_token": True, "antialias": KINDS[kind]["registers"] > 0} | KINDS[kind]
    return architecture_card("vit_nano", patch_size=14, in_channels=3, image_size=42, **options | changes)


def backbone_tensors(kind, seed=1, **changes):
    return random_tensors(official.backbone_like(card_of(kind, **changes))["params"], seed)


def head_tensors(seed, out_dim=K):
    head = DINOHead(out_dim, 48, 16, norm_last_layer=False)
    return random_tensors(jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 64)))["params"], seed)


def prefixed(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def chunked(tensors):
    """The names of three blocks in chunks of two."""
    return {
        name.replace(f"blocks.{i}.", f"blocks.{i // 2}.{i}.") if name.startswith(f"blocks.{i}.") else name: x
        for name, x in tensors.items()
        for i in [int(name.split(".")[1]) if name.startswith("blocks.") else 0]
    }


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


def assert_is(found, kind, tensors):
    assert found.card["architecture"] == card_of(kind)
    assert_same(official.to_official(found.teacher.params["backbone"]), tensors)


@pytest.fixture
def saved(tmp_path):
    """saved(tree) -> the path of a file that holds it."""

    def save(tree, name="weights.safetensors"):
        tensor_files.write(tmp_path / name, tree)
        return tmp_path / name

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_released_and_chunked_backbones(saved, kind):
    tensors = backbone_tensors(kind)
    assert_is(load.load_weights(saved(tensors)), kind, tensors)
    assert "blocks.1.2.ls1.gamma" in chunked(tensors)
    assert_is(load.load_weights(saved(chunked(tensors))), kind, tensors)


def test_two_blocks_of_one_number_are_refused(saved):
    tensors = chunked(backbone_tensors("mlp"))
    tensors["blocks.1.0.ls1.gamma"] = tensors["blocks.0.0.ls1.gamma"]
    with pytest.raises(UserError, match="two tensors map to the same parameter"):
        load.load_weights(saved(tensors))


@pytest.mark.parametrize("separate", [False, True])
def test_training_checkpoints_keep_their_heads(saved, separate, tmp_path):
    backbones = {who: backbone_tensors("swiglu", seed) for who, seed in (("teacher", 1), ("student", 2))}
    heads = {who: {"dino_head": head_tensors(seed)} for who, seed in (("teacher", 3), ("student", 4))}
    if separate:
        for seed, who in enumerate(heads, start=5):
            heads[who]["ibot_head"] = head_tensors(seed, out_dim=24)
    tree = {
        who: prefixed("backbone.", chunked(backbones[who]))
        | {f"{head}.{name}": x for head, tensors in heads[who].items() for name, x in tensors.items()}
        for who in heads
    }
    center = np.ones((1, K), np.float32)
    path = saved({"model": tree | {"dino_loss": {"center": center}, "ibot_patch_loss": {"center": center}}})
    for source in (path, tmp_path / "again.safetensors", tmp_path / "orbax"):
        found = load.load_weights(source)
        for who, weights in (("teacher", found.teacher), ("student", found.student)):
            assert_same(official.to_official(weights.params["backbone"]), backbones[who])
            assert_same(official.to_official(weights.params["head"]), heads[who]["dino_head"])
            assert ("patch_head" in weights.params) == separate
            if separate:
                assert_same(official.to_official(weights.params["patch_head"]), heads[who]["ibot_head"])
        if source == path:
            convert.write_official_checkpoint(found, tmp_path / "again.safetensors")
            convert.write_orbax(found, tmp_path / "orbax")
    names = {name.split(".")[1] for name in tensor_files.read(tmp_path / "again.safetensors") if "teacher" in name}
    assert names == {"backbone", "dino_head"} | ({"ibot_head"} if separate else set())
    assert set(load.load_weights(path, heads=False).teacher.params) == {"backbone"}
    teacher = saved({"teacher": tree["teacher"]}, "teacher_checkpoint.safetensors")
    assert_same(official.to_official(load.load_weights(teacher).teacher.params["head"]), heads["teacher"]["dino_head"])


@pytest.mark.parametrize("kind", KINDS)
def test_timms_names_come_and_go_bit_for_bit(kind):
    theirs = timm.from_official(backbone_tensors(kind))
    assert "mask_token" not in theirs
    assert ("reg_token" in theirs) == kind.startswith("reg4")
    assert theirs["pos_embed"].shape[1] == (9 if "reg_token" in theirs else 10)
    assert not [name for name in theirs if ".w12." in name]
    assert_same(timm.from_official(timm.to_official(theirs)), theirs)
    assert_same(timm.to_official(official.unchunked(backbone_tensors(kind))), backbone_tensors(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_faces_names_come_and_go_bit_for_bit(kind):
    tensors = backbone_tensors(kind)
    theirs = huggingface.from_official(tensors)
    assert huggingface.is_huggingface(theirs)
    assert "encoder.layer.2.layer_scale2.lambda1" in theirs
    assert_same(huggingface.to_official(theirs), tensors)
    for prefix in huggingface.PREFIXES:
        assert huggingface.is_huggingface(prefixed(prefix, theirs))
        assert_same(huggingface.to_official(prefixed(prefix, theirs)), tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["official", "timm", "hf", "orbax"])
def test_every_form_gives_the_same_features(saved, tmp_path, kind, form):
    source = load.load_weights(saved(backbone_tensors(kind)), training=False)
    target = tmp_path / (form if form in ("hf", "orbax") else f"{form}.safetensors")
    convert.FORMS[form](source, target)
    there, back = dino_jax.load_backbone(tmp_path / "weights.safetensors"), dino_jax.load_backbone(target)
    images = jax.random.normal(jax.random.key(0), (1, 28, 56, 3))
    # transformers resizes the positions of models without registers in its own way.
    different = {"pos_offset": 0.0} if form == "hf" and not KINDS[kind]["registers"] else {}
    different |= {"mask_token": False} if form == "timm" else {}
    assert back.config == there.config | different
    assert {name: x for name, x in back.card.items() if name != "provenance"} == {
        name: x for name, x in there.card.items() if name != "provenance"
    } | {"architecture": back.config}
    if "pos_offset" in different:
        images = jax.random.normal(jax.random.key(0), (1, 42, 42, 3))
    for ours, theirs in zip(jax.tree.leaves(back(images)), jax.tree.leaves(there(images)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_evaluation_is_at_224_pixels_though_positions_are_for_518():
    card = card_of("reg4") | {"image_size": 518}
    assert {name: load._preprocessing(card)[name] for name in ("resize", "crop")} == {"resize": 256, "crop": 224}
    dino = card | {"layer_scale": 0.0, "image_size": 448}
    assert {name: load._preprocessing(dino)[name] for name in ("resize", "crop")} == {"resize": 512, "crop": 448}


@pytest.mark.parametrize("kind", ["mlp", "reg4"])
def test_another_image_size_resizes_positions_as_the_model_does(saved, kind):
    path = saved(backbone_tensors(kind))
    images = jax.random.normal(jax.random.key(0), (1, 70, 70, 3))
    native, adapted = dino_jax.load_backbone(path)(images), dino_jax.load_backbone(path, image_size=70)(images)
    np.testing.assert_allclose(adapted.patches, native.patches, atol=2e-5)


def test_a_vit_that_transformers_does_not_have_is_refused(tmp_path):
    card = {"architecture": card_of("reg4", layer_scale=0.0), "preprocessing": {}}
    with pytest.raises(UserError, match="no vit_nano with registers or SwiGLU but without LayerScale: use --to=timm"):
        huggingface.write_folder(tmp_path / "hf", {}, card)


def test_metadata_says_how_positions_are_resized(saved, tmp_path):
    source = load.load_weights(saved(backbone_tensors("mlp")), training=False)
    convert.write_timm(source, tmp_path / "timm.safetensors")  # without a mask token: a file of timm's antialiases
    assert load.load_weights(tmp_path / "timm.safetensors").card["architecture"]["antialias"] is False
    bare = saved(timm.from_official(backbone_tensors("mlp")), "bare.safetensors")
    assert load.load_weights(bare).card["architecture"]["antialias"] is True
    tensor_files.write(tmp_path / "odd.safetensors", backbone_tensors("mlp"), {load.POS_OFFSET: json.dumps("a")})
    with pytest.raises(UserError, match="pos_offset is a, not a number or null"):
        load.load_weights(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("kind", "changes", "form", "said"),
    [
        ("mlp", {}, "official", False),
        ("reg4", {}, "official", False),
        ("reg4", {}, "timm", False),
        ("mlp", {}, "timm", True),  # read back as timm's, which antialiases
        ("mlp", {"mask_token": False}, "official", True),
        ("mlp", {"pos_offset": 0.0}, "official", True),
        ("reg4", {"antialias": False}, "official", True),
    ],
)
def test_what_a_pth_file_cannot_say_of_positions_is_said(kind, changes, form, said):
    assert convert._resizes_otherwise(card_of(kind, **changes), form) == said
    assert not convert._resizes_otherwise({"arch": "resnet18"}, form)


def test_a_damaged_card_is_named(tmp_path):
    source = {"architecture": card_of("mlp"), "preprocessing": {}, "provenance": {}}
    assert source["architecture"].keys() >= VARIANT.keys()
    odd = {"registers": -1, "layer_scale": "a", "ffn": 3, "antialias": 1, "pos_offset": "a", "mask_token": None}
    for name, value in odd.items():
        card = write_card(tmp_path, source["architecture"] | {name: value})
        with pytest.raises(UserError, match=rf"card.json is damaged \({name} is"):
            load.read_card(card)


def write_card(folder, architecture):
    preprocessing = {"resize": 256, "crop": 224, "mean": [0.5], "std": [0.5]}
    card = {"architecture": architecture, "preprocessing": preprocessing, "provenance": {}}
    (folder / "card.json").write_text(json.dumps(card))
    return folder
