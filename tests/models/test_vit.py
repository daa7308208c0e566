import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from dino_jax.models.drop_path import drop_path_factors
from dino_jax.models.positions import resize_pos_embed
from dino_jax.models.vit import ViT
from dino_jax.weights.official import from_official, to_official


@pytest.fixture(scope="module")
def reference(golden):
    """The golden's model with its weights: (arrays, meta, module, variables)."""
    arrays, meta = golden("vit")
    c = meta["config"]
    module = ViT(c["embed_dim"], c["depth"], c["num_heads"], c["patch_size"], c["img_size"], c["mlp_ratio"])
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, c["img_size"], c["img_size"], 3)))
    weights = {key[2:]: value for key, value in arrays.items() if key.startswith("w/")}
    return arrays, meta, module, from_official(template, weights, "golden")


def images(arrays, height, width):
    return jnp.asarray(arrays[f"in/x_{height}x{width}"].transpose(0, 2, 3, 1))


def stacked(tokens):
    """[B, 1+N, D], as the reference returns tokens."""
    return jnp.concatenate([tokens.cls[:, None], tokens.patches], axis=1)


@pytest.mark.slow
def test_outputs_at_every_size(reference):
    arrays, meta, module, variables = reference
    for height, width in meta["config"]["sizes"]:
        x, size = images(arrays, height, width), f"{height}x{width}"
        first, last = module.apply(variables, x, 2, method="last_blocks")
        ours = {
            f"cls_{size}": module.apply(variables, x).cls,
            f"inter2_first_{size}": stacked(first),
            f"inter2_last_{size}": stacked(last),
            f"attn_last_{size}": module.apply(variables, x, method="last_attention"),
        }
        for key, value in ours.items():
            assert_close(value, arrays, key, meta)


def test_position_embeddings_of_the_model(reference):
    arrays, meta, module, variables = reference
    for height, width in meta["config"]["sizes"]:
        rows, columns = height // module.patch_size, width // module.patch_size
        pos = resize_pos_embed(variables["params"]["pos_embed"], rows, columns, height == width)
        assert_close(pos, arrays, f"pos_{height}x{width}", meta)


def test_position_embeddings_of_real_grids(golden):
    arrays, meta = golden("pos_embed")
    for i, grid in enumerate(meta["config"]):
        for height, width in grid["to"]:
            rows, columns = height // grid["patch_size"], width // grid["patch_size"]
            pos = resize_pos_embed(jnp.asarray(arrays[f"in/pos{i}"]), rows, columns, height == width)
            key = f"pos{i}_{height}x{width}"
            assert_close(pos, arrays, key, meta)


@pytest.mark.parametrize("size", [(32, 32), (33, 33), (32, 36), (36, 32), (16, 64), (40, 24)])
def test_positions_stay_as_learned_only_for_square_images(size):
    """The published rule, computed by torch, for 4 x 4 learned positions and patches of 8 pixels."""
    torch = pytest.importorskip("torch")
    learned = np.random.default_rng(0).standard_normal((1, 17, 6)).astype(np.float32)
    (height, width), (rows, columns) = size, (side // 8 for side in size)
    expected = learned
    if not (rows * columns == 16 and height == width):
        grid = torch.from_numpy(learned[:, 1:].reshape(1, 4, 4, 6).transpose(0, 3, 1, 2).copy())
        factors = (rows + 0.1) / 4, (columns + 0.1) / 4
        resized = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic")
        patches = resized.permute(0, 2, 3, 1).reshape(1, rows * columns, 6).numpy()
        expected = np.concatenate([learned[:, :1], patches], axis=1)
    ours = resize_pos_embed(jnp.asarray(learned), rows, columns, height == width)
    np.testing.assert_allclose(ours, expected, atol=2e-6)  # float32
    model = ViT(6, 1, 2, patch_size=8, image_size=32)
    images = jnp.zeros((1, height, width, 3))
    params = model.init(jax.random.key(0), images)["params"]
    tokens = [
        model.apply({"params": {**params, "pos_embed": positions}}, images, method="tokens")
        for positions in (jnp.asarray(learned), jnp.zeros((1, 17, 6)))
    ]
    np.testing.assert_allclose(tokens[0] - tokens[1], expected, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, {"remat": True}, {"unroll": True}, {"attention": "cudnn"}])
def test_gradients(reference, changes, monkeypatch):
    # XLA computes in cuDNN's place: what is tested is our call, which takes the same arguments there.
    attend = jax.nn.dot_product_attention
    by_xla = lambda *args, implementation, **lengths: attend(*args, implementation="xla", **lengths)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    arrays, meta, module, variables = reference
    x, r = images(arrays, *re.search(r"x_(\d+)x(\d+)", meta["grad"]).groups()), arrays["in/r"]
    module = module.copy(**changes)
    grads = jax.grad(lambda params: jnp.sum(module.apply({"params": params}, x).cls * r))(variables["params"])
    for name, grad in to_official(grads).items():
        assert_close(grad, arrays, f"grad/{name}", meta)


def test_cudnn_takes_any_number_of_tokens(monkeypatch):
    # A program for a GPU, made without one: JAX's own checks of what cuDNN supports run, above all on odd numbers.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: float(capability) <= 8)
    module = ViT(32, 2, 2, patch_size=8, image_size=16, attention="cudnn", dtype=jnp.bfloat16)
    plain = module.copy(attention="xla")
    for size, tokens in ((16, 5), (24, 10), (8, 2)):
        x = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
        variables = jax.eval_shape(plain.init, jax.random.key(0), x)
        gradient = jax.jit(jax.grad(lambda variables, x: module.apply(variables, x).cls.sum().astype(jnp.float32)))
        program = gradient.trace(variables, x).lower(lowering_platforms=("cuda",)).as_text()
        assert "__cudnn$fmhaSoftmaxBackward" in program
        assert f"tensor<3x2x{tokens}x{tokens}x" not in program  # no attention matrix


def test_any_number_of_channels():
    module = ViT(32, 2, 2, patch_size=8, image_size=16)
    x = jnp.ones((2, 16, 24, 5))
    tokens = module.apply(module.init(jax.random.key(0), x), x)
    assert tokens.cls.shape == (2, 32)
    assert (tokens.registers.shape, tokens.patches.shape, tokens.grid) == ((2, 0, 32), (2, 6, 32), (2, 3))


def test_drop_path_keeps_the_mean_and_grows_with_depth():
    keys = jax.random.split(jax.random.key(0), 2_000)
    factors = np.asarray(drop_path_factors(keys, rate=0.3, depth=4, views=5))
    assert factors.shape == (4, 2, 10_000)
    np.testing.assert_allclose((factors == 0).mean((1, 2)), [0, 0.1, 0.2, 0.3], atol=0.01)  # 3 sigma of 20,000 draws
    np.testing.assert_allclose(factors.mean((1, 2)), 1, atol=0.015)
    alone = drop_path_factors(keys[7:8], rate=0.3, depth=4, views=5)
    np.testing.assert_array_equal(alone, factors[:, :, 35:40])


@pytest.mark.slow
def test_dropped_branches_leave_the_input():
    module = ViT(32, 2, 2, patch_size=8, image_size=16)
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = module.init(jax.random.key(0), x)
    everything = jnp.ones((2, 2, 2))
    kept = module.apply(variables, x, False, everything).cls
    np.testing.assert_allclose(kept, module.apply(variables, x).cls, rtol=1e-6)
    only_first = everything.at[:, :, 1].set(0)
    first, second = module.apply(variables, x, False, only_first).cls
    np.testing.assert_allclose(first, module.apply(variables, x).cls[0], rtol=1e-5, atol=1e-6)
    tokens = module.apply(variables, x, method="tokens")[1, 0]
    normed = (tokens - tokens.mean()) / jnp.sqrt(tokens.var() + 1e-6)
    np.testing.assert_allclose(second, normed, rtol=1e-4, atol=1e-5)
