import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_names import from_torch, to_torch

from dino_jax.models import DINOHead

KINDS = ["norm", "nonorm", "bn", "l1", "l2"]


@pytest.fixture(params=KINDS)
def reference(request, golden):
    """A golden head with its weights: (arrays of the kind, module, variables, options for the names)."""
    kind = request.param
    arrays, meta = golden("head")
    c, options = meta["config"], meta["kinds"][kind]
    names = {"use_bn": options.get("use_bn", False), "layers": options.get("nlayers", 3)}
    module = DINOHead(
        c["out_dim"],
        c["hidden_dim"],
        c["bottleneck_dim"],
        layers=names["layers"],
        use_bn=names["use_bn"],
        norm_last_layer=options.get("norm_last_layer", True),
    )
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, c["in_dim"])))
    prefix = f"w/{kind}/"
    weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    variables = {part: from_torch(tree, weights, **names) for part, tree in template.items()}
    of_kind = {key.removeprefix(f"{kind}/"): value for key, value in arrays.items()}
    return of_kind, module, variables, names


def test_output_and_gradients(reference):
    arrays, module, variables, names = reference
    x, r = jnp.asarray(arrays["in/x"]), arrays["in/r"]

    def objective(params, x):
        out, mutated = module.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(out * r), (out, mutated)

    (grads, grad_x), (out, mutated) = jax.grad(objective, argnums=(0, 1), has_aux=True)(variables["params"], x)
    np.testing.assert_allclose(out, arrays["out_train"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_x, arrays["grad_x"], rtol=1e-4, atol=1e-4)
    grads = to_torch(grads, **names)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, arrays[f"grad/{name}"], err_msg=name, rtol=1e-4, atol=1e-4)
    assert {f"grad/{name}" for name in grads} <= set(arrays)
    for name, value in to_torch(mutated.get("batch_stats", {}), **names).items():
        np.testing.assert_allclose(value, arrays[f"after/{name}"], err_msg=name, rtol=1e-4, atol=1e-5)
    if names["use_bn"]:
        np.testing.assert_allclose(module.apply(variables, x), arrays["out_eval"], rtol=1e-4, atol=1e-4)


def test_gradient_at_zero_features_is_finite():
    module = DINOHead(8, 8, 4)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4)))
    grads = jax.grad(lambda params: module.apply({"params": params}, jnp.zeros((2, 4))).sum())(variables["params"])
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
