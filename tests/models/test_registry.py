"""The registry: every architecture returns Tokens, does what its family says, and comes back from its card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from dino_jax.errors import UserError
from dino_jax.models import ARCHITECTURES, Tokens, build_backbone, family_of, from_card, registry

ANY = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def sizes_for(arch):
    return ANY if arch == "vit" else {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_does_what_its_family_says(arch):
    family = family_of(arch)
    module = build_backbone(arch, patch_size=16, image_size=32, **sizes_for(arch))
    images = jax.ShapeDtypeStruct((2, 32, 64, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)

    def shapes(method, *args):
        return jax.eval_shape(lambda variables, x: module.apply(variables, x, *args, method=method), variables, images)

    tokens = shapes("__call__")
    assert isinstance(tokens, Tokens)
    rows, columns = tokens.grid
    assert tokens.cls.shape == (2, module.embed_dim)
    assert tokens.registers.shape == (2, 0, module.embed_dim)
    assert tokens.patches.shape == (2, rows * columns, module.embed_dim)
    assert family.input_layer in variables["params"]
    assert ("pos_embed" in variables["params"]) == family.learned_positions
    blocks = 2 if family.block_tokens else 1
    assert jax.tree.map(jnp.shape, shapes("last_blocks", blocks)) == [jax.tree.map(jnp.shape, tokens)] * blocks
    assert hasattr(module, "last_attention") == family.attention_maps
    assert ("axis_name" in family.arguments) == ("batch_stats" in variables)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_comes_back_from_its_card(arch):
    sizes = sizes_for(arch)
    card = registry.architecture_card(arch, patch_size=8, in_channels=1, image_size=40, sizes=sizes)
    assert from_card(card) == build_backbone(arch, patch_size=8, image_size=40, **sizes)
    assert card["patch_size"] == (8 if family_of(arch).square_patches else None)
    assert {"depth", "num_heads"} <= set(card) if sizes else not {"depth", "num_heads"} & set(card)


VARIANT = {
    "registers": 4,
    "layer_scale": 1e-5,
    "ffn": "swiglu",
    "antialias": True,
    "pos_offset": 0.0,
    "mask_token": True,
}


def test_a_dinov2_model_comes_back_from_its_card():
    card = registry.architecture_card("vit_nano", patch_size=14, in_channels=3, image_size=28, **VARIANT)
    assert card.keys() >= VARIANT.keys() == registry.VARIANT.keys()
    module = build_backbone("vit_nano", patch_size=14, image_size=28, **VARIANT)
    assert from_card(card) == module
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    assert params["register_tokens"].shape == (1, 4, 64)
    assert params["mask_token"].shape == (1, 64)
    assert params["blocks"]["ls2"]["gamma"].shape == (3, 64)
    assert set(params["blocks"]["mlp"]) == {"w12", "w3"}


def test_a_card_of_an_earlier_version_is_dinos_vit():
    card = registry.architecture_card("vit_nano", patch_size=8, in_channels=3, image_size=32)
    earlier = {name: value for name, value in card.items() if name not in registry.VARIANT}
    assert from_card(earlier) == from_card(card) == build_backbone("vit_nano", patch_size=8, image_size=32)


def test_an_unknown_feed_forward_network_is_named():
    with pytest.raises(UserError, match="network 'glu': set --config.model.ffn to one of mlp, swiglu"):
        build_backbone("vit_nano", ffn="glu")


def test_settings_of_families_are_keys_of_the_config():
    model = default.get_config().model
    for architecture in ARCHITECTURES.values():
        assert set(architecture.family.settings) <= set(model)
    assert set(registry.SIZES) <= set(model)
    assert registry.given_variant(model) == registry.given_variant({"arch": "vit_small"})
    assert (
        registry.given_sizes(model) == registry.given_sizes({"arch": "vit_small"}) == dict.fromkeys(registry.SIZES, 0)
    )


def test_a_vit_of_a_named_ones_sizes_is_that_one():
    sizes = {"embed_dim": 64, "depth": 3, "num_heads": 4}
    assert registry.vit_name(sizes) == "vit_nano"
    assert registry.vit_name(sizes | {"num_heads": 2}) == registry.vit_name(sizes | {"depth": 4}) == "vit"
    ours, named = build_backbone("vit", image_size=32, **sizes), build_backbone("vit_nano", image_size=32)
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = named.init(jax.random.key(1), x)
    np.testing.assert_array_equal(ours.apply(variables, x).cls, named.apply(variables, x).cls)


@pytest.mark.parametrize(
    ("arch", "sizes", "message"),
    [
        ("vit", {}, "needs model.embed_dim, model.depth, model.num_heads: set --config.model.embed_dim=N --config"),
        ("vit", {"embed_dim": 48, "num_heads": 3}, "set --config.model.depth=N, or"),
        ("vit", ANY | {"num_heads": 5}, "embed_dim 48 is not a multiple of model.num_heads 5: set --config.model.num"),
        ("vit_small", {"depth": 4}, r"model.depth=4 is set: set --config.model.arch=vit, or --config.model.depth=0"),
        ("resnet18", {"num_heads": 4}, "model.arch=resnet18 has fixed sizes"),
        ("xcit_small_12", {"patch_size": 14}, "no patch size 14: set --config.model.patch_size to 8 or 16"),
        ("vit_huge", {}, "unknown architecture 'vit_huge': set --config.model.arch to one of vit_nano"),
    ],
)
def test_sizes_that_do_not_go_together_are_named(arch, sizes, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone(arch, **sizes)
    assert "\n" not in str(error.value)


def test_unused_patches_cost_nothing_under_jit():
    module = build_backbone("vit_nano", patch_size=8, image_size=32)
    x = jnp.ones((2, 32, 32, 3))
    variables = module.init(jax.random.key(0), x)

    def cost(take):
        program = jax.jit(lambda variables, x: take(module.apply(variables, x))).lower(variables, x).compile()
        return program.cost_analysis()["flops"]

    assert cost(lambda tokens: tokens.cls) < cost(lambda tokens: (tokens.cls, tokens.patches))
