import jax
import jax.numpy as jnp
from tolerances import assert_close

from dino_jax.models import build_backbone
from dino_jax.weights.official import from_official, to_official


def test_resnet50(golden, rule_weights):
    arrays, meta = golden("resnet50")
    weights = rule_weights(meta["shapes"], meta["weights_seed"], meta["gain"])
    x = jnp.asarray(arrays["in/x"].transpose(0, 2, 3, 1))
    module = build_backbone("resnet50")
    variables = from_official(jax.eval_shape(module.init, jax.random.key(0), x), weights, "golden")

    def check(features, key):
        assert_close(features, arrays, key, meta)

    check(module.apply(variables, x), "feat_eval")
    features, mutated = module.apply(variables, x, True, mutable=["batch_stats"])
    check(features, "feat_train")
    after = to_official(mutated["batch_stats"])
    for key in arrays:
        if key.startswith("after_train/"):
            ours = after[key.removeprefix("after_train/")]
            assert_close(ours, arrays, key, meta)


def test_resnet18_takes_any_channels():
    module = build_backbone("resnet18")
    x = jnp.ones((2, 40, 32, 1))
    variables = module.init(jax.random.key(0), x)
    assert module.apply(variables, x).shape == (2, module.embed_dim) == (2, 512)
