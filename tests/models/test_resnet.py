import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from dino_jax.models import build_backbone
from dino_jax.weights.official import from_official, to_official


@pytest.mark.slow
def test_resnet50(golden, rule_weights):
    arrays, meta = golden("resnet50")
    weights = rule_weights(meta["shapes"], meta["weights_seed"], meta["gain"])
    x = jnp.asarray(arrays["in/x"].transpose(0, 2, 3, 1))
    module = build_backbone("resnet50")
    variables = from_official(jax.eval_shape(module.init, jax.random.key(0), x), weights, "golden")

    def check(features, key):
        assert_close(features, arrays, key, meta)

    check(module.apply(variables, x).cls, "feat_eval")
    tokens, mutated = module.apply(variables, x, True, mutable=["batch_stats"])
    check(tokens.cls, "feat_train")
    after = to_official(mutated["batch_stats"])
    for key in arrays:
        if key.startswith("after_train/"):
            ours = after[key.removeprefix("after_train/")]
            assert_close(ours, arrays, key, meta)


@pytest.mark.slow
def test_resnet18_takes_any_channels():
    module = build_backbone("resnet18")
    x = jnp.ones((2, 40, 32, 1))
    variables = module.init(jax.random.key(0), x)
    tokens = module.apply(variables, x)
    assert tokens.cls.shape == (2, module.embed_dim) == (2, 512)
    assert (tokens.registers.shape, tokens.patches.shape, tokens.grid) == ((2, 0, 512), (2, 2, 512), (2, 1))


def test_patches_are_the_cells_of_the_last_feature_map_and_cls_is_their_float32_mean():
    module = build_backbone("resnet18", dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 64, 96, 3))
    variables = module.init(jax.random.key(1), x)
    tokens = module.apply(variables, x)
    assert (tokens.cls.dtype, tokens.patches.dtype, tokens.grid) == (jnp.float32, jnp.bfloat16, (2, 3))
    np.testing.assert_allclose(tokens.patches.astype(jnp.float32).mean(1), tokens.cls, rtol=1e-6, atol=1e-6)
    # A cell depends on the pixels of its place more than on those of the opposite corner.
    other = module.apply(variables, x.at[:, :8, :8].add(9)).patches.astype(jnp.float32)
    change = jnp.abs(other - tokens.patches.astype(jnp.float32)).mean((0, 2))
    assert change.argmax() == 0
    (one,) = module.apply(variables, x, 1, method="last_blocks")
    np.testing.assert_array_equal(one.patches, tokens.patches)
    with pytest.raises(ValueError, match="one feature map"):
        module.apply(variables, x, 2, method="last_blocks")
