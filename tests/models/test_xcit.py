"""XCiT's names, files and settings; its features are compared with timm's in tests/weights/test_peers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

import dino_jax
from dino_jax.commands import convert
from dino_jax.errors import UserError
from dino_jax.models import build_backbone, xcit
from dino_jax.models.layers import apply_in_training
from dino_jax.training.config_checks import check_config
from dino_jax.weights import load, official, tensor_files

pytestmark = pytest.mark.slow

CARD = {"arch": "xcit_small_12", "patch_size": 16, "in_channels": 3, "image_size": 224, "embed_dim": 384}
OFFICIAL = {  # one tensor of each kind, as the official code names them
    "cls_token": (1, 1, 384),
    "pos_embeder.token_projection.weight": (384, 64, 1, 1),
    "patch_embed.proj.0.0.weight": (48, 3, 3, 3),
    "patch_embed.proj.6.1.running_var": (384,),
    "blocks.11.attn.temperature": (8, 1, 1),
    "blocks.11.attn.qkv.weight": (1152, 384),
    "blocks.11.local_mp.conv2.weight": (384, 1, 3, 3),
    "blocks.11.local_mp.bn.running_mean": (384,),
    "blocks.11.gamma3": (384,),
    "blocks.11.mlp.fc1.weight": (1536, 384),
    "cls_attn_blocks.1.attn.qkv.weight": (1152, 384),
    "cls_attn_blocks.1.gamma2": (384,),
    "norm.weight": (384,),
}


@pytest.fixture(scope="module")
def tensors():
    like, rng = official.backbone_like(CARD), np.random.default_rng(0)
    variables = jax.tree.map(lambda s: 0.1 * np.abs(rng.standard_normal(s.shape, np.float32)), like)
    return official.to_official(variables["params"]) | official.to_official(variables["batch_stats"])


def test_official_names(tensors):
    assert OFFICIAL.items() <= {name: x.shape for name, x in tensors.items()}.items()


@pytest.mark.parametrize("form", ["official", "timm", "orbax"])
def test_every_form_reads_back_bit_for_bit(tensors, tmp_path, form):
    tensor_files.write(tmp_path / "source.safetensors", official.with_counters(tensors))
    source = load.load_weights(tmp_path / "source.safetensors", training=False)
    assert source.card["architecture"] == CARD
    target = tmp_path / ("orbax" if form == "orbax" else f"{form}.safetensors")
    convert.FORMS[form](source, target)
    found = load.load_weights(target, training=False)
    assert found.card["architecture"] == CARD
    jax.tree.map(np.testing.assert_array_equal, found.teacher, source.teacher)
    with pytest.raises(UserError, match="only supports ViTs, not xcit_small_12: use --to=timm"):
        convert.write_huggingface(source, tmp_path / "hf")


def test_another_image_size_and_no_attention(tensors, tmp_path):
    tensor_files.write(tmp_path / "source.safetensors", tensors)
    backbone = dino_jax.load_backbone(tmp_path / "source.safetensors", image_size=64, in_channels=1)
    tokens = backbone(jnp.ones((1, 64, 32, 1)))
    assert (tokens.patches.shape, tokens.grid) == ((1, 8, 384), (4, 2))
    with pytest.raises(UserError, match="xcit_small_12 has no attention between patches: use a vision transformer"):
        backbone.attention(jnp.ones((1, 64, 64, 1)))
    with pytest.raises(UserError, match="returns features of 1 to 1 blocks"):
        backbone.last_blocks(jnp.ones((1, 64, 64, 1)), 2)


def test_another_xcit_is_named(tensors):
    fewer = {name: x for name, x in tensors.items() if not name.startswith("blocks.11.")}
    with pytest.raises(UserError, match="an XCiT of width 384 and depth 11 with 4 convolutions, which is none of xcit"):
        official.backbone_architecture(fewer, "x")


def test_training_updates_the_statistics_of_batch_norm():
    module = xcit.XCiT(32, 1, 1.0, num_heads=4, patch_size=8)
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables = module.init(jax.random.key(1), images)
    tokens, stats = apply_in_training(module, variables["params"], variables["batch_stats"], images, None)
    assert tokens.patches.shape == (4, 16, 32)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__patch_size": 4}, "xcit_small_12 has no patch size 4: set --config.model.patch_size to 8 or 16"),
        ({"model__drop_path_rate": 0.1}, "xcit_small_12 has no drop path: set --config.model.drop_path_rate=0"),
        ({"model__registers": 4}, "xcit_small_12 has no registers"),
        ({"crops__global_size": 36}, "crops.global_size 36 is not a multiple of the patch size 8"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(**{"model__arch": "xcit_small_12", "model__drop_path_rate": 0.0} | changes), devices=8)


def test_positions_of_fourier_features():
    features = xcit.fourier_features(3, 5)
    assert features.shape == (3, 5, 64)
    np.testing.assert_allclose(features[2, 0, 0], 0, atol=1e-5)  # the sine of a full turn in the last row
    np.testing.assert_allclose(features[0, 0, 0], np.sin(2 * np.pi / 3), atol=1e-5)
    np.testing.assert_array_equal(features[:, :, :32], np.broadcast_to(features[:, :1, :32], (3, 5, 32)))
    assert build_backbone("xcit_medium_24", patch_size=8).depth == 24
