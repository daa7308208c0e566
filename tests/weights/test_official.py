import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dino_jax.errors import UserError
from dino_jax.models.registry import VARIANT
from dino_jax.weights import official

PUBLISHED = {  # name in official_models.json -> what must be read off its tensors
    "vit_small_16": {"arch": "vit_small", "patch_size": 16, "image_size": 224, "embed_dim": 384},
    "vit_small_8": {"arch": "vit_small", "patch_size": 8, "image_size": 224, "embed_dim": 384},
    "vit_base_16": {"arch": "vit_base", "patch_size": 16, "image_size": 224, "embed_dim": 768},
    "vit_base_8": {"arch": "vit_base", "patch_size": 8, "image_size": 224, "embed_dim": 768},
    "resnet50": {"arch": "resnet50", "patch_size": None, "image_size": 224, "embed_dim": 2048},
}


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def published(goldens_dir, rule_weights):
    """published(name) -> (backbone's and head's tensors, facts) of an official model at full size, weights by rule."""
    models = json.loads((goldens_dir / "official_models.json").read_text())["models"]

    def make(name):
        shapes = {tensor: facts["shape"] for tensor, facts in models[name]["state_dict"].items()}
        weights = rule_weights(shapes, seed=7)
        parts = [
            {tensor.removeprefix(part): x for tensor, x in weights.items() if tensor.startswith(part)}
            for part in ("backbone.", "head.")
        ]
        return parts, models[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_come_and_go_bit_for_bit(published, name):
    (backbone, head), facts = published(name)
    architecture = official.backbone_architecture(backbone, name)
    plain = VARIANT if name.startswith("vit") else {}
    assert architecture == PUBLISHED[name] | plain | {"in_channels": 3}

    variables = official.from_official(official.backbone_like(architecture), backbone, name)
    assert size(variables["params"]) == facts["backbone_params"]
    head_variables = official.from_official(official.head_like(head, architecture["embed_dim"]), head, name)
    assert size(head_variables) == facts["head_params"]

    for tensors, tree in ((backbone, variables), (head, head_variables)):
        back = official.to_official(tree["params"]) | official.to_official(tree["batch_stats"])
        assert set(back) == set(tensors)
        for tensor, value in tensors.items():
            np.testing.assert_array_equal(back[tensor], value, err_msg=tensor)


@pytest.fixture(scope="module")
def published2():
    """Facts about the eight released models of DINOv2: name -> number of parameters, and shapes by tensor name."""
    path = Path(__file__).parents[1] / "golden2" / "official_models2.json"  # other folders of goldens have none
    return json.loads(path.read_text())["published"]


DINOV2 = {
    "dinov2_vits14": ("vit_small", 384, "mlp"),
    "dinov2_vitb14": ("vit_base", 768, "mlp"),
    "dinov2_vitl14": ("vit_large", 1024, "mlp"),
    "dinov2_vitg14": ("vit_giant", 1536, "swiglu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("name", DINOV2)
def test_shapes_of_dinov2_come_and_go(published2, name, registers):
    facts = published2[name + ("_reg4" if registers else "")]
    shapes = {tensor: tuple(shape) for tensor, shape in facts["state_dict"].items()}
    zero = np.float32(0)  # seen in every shape without memory: ViT-g has a billion parameters
    architecture = official.backbone_architecture({t: np.broadcast_to(zero, s) for t, s in shapes.items()}, name)
    arch, embed_dim, ffn = DINOV2[name]
    assert architecture == {
        "arch": arch,
        "patch_size": 14,
        "in_channels": 3,
        "image_size": 518,
        "embed_dim": embed_dim,
        "registers": registers,
        "layer_scale": 1e-5,
        "ffn": ffn,
        "antialias": registers > 0,
        "pos_offset": None,
        "mask_token": True,
    }
    like = official.backbone_like(architecture)
    assert size(like) == facts["params"]
    tree = jax.tree.map(lambda s: np.broadcast_to(zero, s.shape), like["params"])
    assert {tensor: x.shape for tensor, x in official.to_official(tree).items()} == shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg4"])
def test_released_dinov2_models_come_and_go_bit_for_bit(published2, rule_weights2, name):
    tensors = rule_weights2(published2[name]["state_dict"], seed=7)
    like = official.backbone_like(official.backbone_architecture(tensors, name))
    back = official.to_official(official.from_official(like, tensors, name)["params"])
    assert set(back) == set(tensors)
    for tensor, value in tensors.items():
        np.testing.assert_array_equal(back[tensor], value, err_msg=tensor)


def test_every_name_that_strict_loading_in_torch_wants_is_there(published, goldens_dir):
    (backbone, _), _ = published("resnet50")
    like = official.backbone_like(official.backbone_architecture(backbone, "resnet50"))
    tree = official.from_official(like, backbone, "resnet50")
    back = official.with_counters(official.to_official(tree["params"]) | official.to_official(tree["batch_stats"]))
    models = json.loads((goldens_dir / "official_models.json").read_text())["models"]
    names = {name for name in models["resnet50"]["state_dict"] if name.startswith("backbone.")}
    assert {f"backbone.{name}" for name in back} == names


@pytest.fixture(scope="module")
def tiny():
    """A vit_nano's shapes and tensors."""
    like = official.backbone_like({"arch": "vit_nano", "patch_size": 8, "image_size": 32, "in_channels": 3})
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), like)
    return like, official.to_official(variables["params"])


def test_missing_unused_and_misshapen_tensors_are_all_listed(tiny):
    like, tensors = tiny
    broken = dict(tensors, **{"blocks.9.norm1.weight": np.ones(64), "norm.bias": np.ones(63)})
    del broken["cls_token"], broken["blocks.1.attn.qkv.bias"]
    with pytest.raises(UserError) as error:
        official.from_official(like, broken, "x.pth")
    message = str(error.value)
    assert "\n" not in message
    assert "x.pth" in message
    assert "2 missing: " in message
    assert all(name in message for name in ("cls_token", "blocks.1.attn.qkv.bias"))
    assert "1 not used: blocks.9.norm1.weight" in message
    assert "1 of another shape: norm.bias (63,) instead of (64,)" in message


def test_half_precision_is_widened_exactly(tiny):
    like, tensors = tiny
    halves = {name: x.astype(np.float16) for name, x in tensors.items()}
    variables = official.from_official(like, halves, "halves")
    for name, x in official.to_official(variables["params"]).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, halves[name].astype(np.float32))


def test_what_is_none_of_our_architectures_is_named(tiny):
    _, tensors = tiny
    with pytest.raises(UserError, match="x has a ViT's embeddings but no blocks"):
        official.backbone_architecture({n: x for n, x in tensors.items() if not n.startswith("blocks.")}, "x")
    with pytest.raises(UserError, match="holds no known backbone \\(features.0"):
        official.backbone_architecture({"features.0.weight": np.ones(3)}, "x")
    with pytest.raises(UserError, match="8 x 4 pixels"):
        official.backbone_architecture(tensors | {"patch_embed.proj.weight": np.ones((64, 3, 8, 4))}, "x")
    with pytest.raises(UserError, match="only square"):
        official.backbone_architecture(tensors | {"pos_embed": np.ones((1, 13, 64))}, "x")
    resnet34 = {"conv1.weight": np.ones((64, 3, 7, 7))} | {
        f"layer{stage}.{i}.conv1.weight": np.ones(1) for stage, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for i in range(n)
    }
    with pytest.raises(UserError, match=r"\(3, 4, 6, 3\) blocks of 2 convolutions, which is none of resnet18"):
        official.backbone_architecture(resnet34, "x")
