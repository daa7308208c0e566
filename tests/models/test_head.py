import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.models import DINOHead
from dino_jax.weights.official import from_official, to_official

KINDS = ["norm", "nonorm", "bn", "l1", "l2"]


@pytest.fixture(params=KINDS)
def reference(request, golden):
    """A golden head with its weights: (arrays of the kind, module, variables)."""
    kind = request.param
    arrays, meta = golden("head")
    c, options = meta["config"], meta["kinds"][kind]
    module = DINOHead(
        c["out_dim"],
        c["hidden_dim"],
        c["bottleneck_dim"],
        layers=options.get("nlayers", 3),
        use_bn=options.get("use_bn", False),
        norm_last_layer=options.get("norm_last_layer", True),
    )
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, c["in_dim"])))
    prefix = f"w/{kind}/"
    weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    if module.norm_last_layer:
        np.testing.assert_array_equal(weights.pop("last_layer.weight_g"), 1)  # no parameter of ours then
    variables = from_official(template, weights, kind)
    of_kind = {key.removeprefix(f"{kind}/"): value for key, value in arrays.items()}
    return of_kind, module, variables


def test_output_and_gradients(reference):
    arrays, module, variables = reference
    x, r = jnp.asarray(arrays["in/x"]), arrays["in/r"]

    def objective(params, x):
        out, mutated = module.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(out * r), (out, mutated)

    (grads, grad_x), (out, mutated) = jax.grad(objective, argnums=(0, 1), has_aux=True)(variables["params"], x)
    np.testing.assert_allclose(out, arrays["out_train"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_x, arrays["grad_x"], rtol=1e-4, atol=1e-4)
    grads = to_official(grads)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, arrays[f"grad/{name}"], err_msg=name, rtol=1e-4, atol=1e-4)
    assert {f"grad/{name}" for name in grads} <= set(arrays)
    for name, value in to_official(mutated.get("batch_stats", {})).items():
        np.testing.assert_allclose(value, arrays[f"after/{name}"], err_msg=name, rtol=1e-4, atol=1e-5)
    if module.use_bn:
        np.testing.assert_allclose(module.apply(variables, x), arrays["out_eval"], rtol=1e-4, atol=1e-4)


def test_gradient_at_zero_features_is_finite():
    module = DINOHead(8, 8, 4)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4)))
    grads = jax.grad(lambda params: module.apply({"params": params}, jnp.zeros((2, 4))).sum())(variables["params"])
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
