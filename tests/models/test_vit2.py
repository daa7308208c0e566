"""The parts of the ViT that DINOv2 added, against the arrays of its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.models import DINOHead
from dino_jax.models.blocks import Block
from dino_jax.models.positions import resize_pos_embed
from dino_jax.models.vit import ViT
from dino_jax.weights import official

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def variants(golden2, rule_weights2):
    """variants() -> for each variant: (name, its options, arrays, module, variables)."""
    arrays, meta = golden2("vit2")
    c = meta["config"]

    def build():
        for name, options in c["variants"].items():
            facts = meta["variants"][name]
            weights = official.unchunked(rule_weights2(facts["shapes"], facts["weights_seed"], 1.0))
            for tensor, total in facts["check_sums"].items():
                value = weights[next(iter(official.unchunked({tensor: None})))]
                np.testing.assert_allclose(value.sum(dtype=np.float64), total, rtol=1e-5, atol=1e-4)
            module = ViT(
                c["embed_dim"],
                c["depth"],
                c["num_heads"],
                options["patch_size"],
                options["img_size"],
                registers=options["regs"],
                layer_scale=1e-5,
                ffn="mlp" if options["ffn"] == "mlp" else "swiglu",
                mask_token=True,
                antialias=options["antialias"],
                pos_offset=options["offset"],
            )
            image = jnp.zeros((1, options["img_size"], options["img_size"], 3))
            like = jax.eval_shape(module.init, jax.random.key(0), image)
            yield name, options | facts, arrays, module, official.from_official(like, weights, name)

    return build


def inputs(arrays, options, height, width):
    """Images [B, H, W, C] and masks [B, N] of a size."""
    x = jnp.asarray(arrays[f"in/x_{height}x{width}"].transpose(0, 2, 3, 1))
    return x, jnp.asarray(arrays[f"in/mask_p{options['patch_size']}_{height}x{width}"])


def prenorm(module, images, masks):
    return module.blocks(module.tokens(images, masks), None, False)[0]


def outputs(module, variables, images, masks):
    """Our arrays by the names of the golden's."""
    tokens = module.apply(variables, images, masks=masks)
    return {
        "x_norm_clstoken": tokens.cls,
        "x_norm_regtokens": tokens.registers,
        "x_norm_patchtokens": tokens.patches,
        "x_prenorm": module.apply(variables, images, masks, method=prenorm),
    }


def test_outputs_at_every_size_masked_and_not(variants):
    for name, options, arrays, module, variables in variants():
        for height, width in options["sizes"]:
            images, masks = inputs(arrays, options, height, width)
            compared = 0
            for prefix, given in ((f"{name}/{height}x{width}", None), (f"{name}/{height}x{width}/masked", masks)):
                for key, value in outputs(module, variables, images, given).items():
                    if f"{prefix}/{key}" in arrays:
                        np.testing.assert_allclose(
                            value, arrays[f"{prefix}/{key}"], err_msg=f"{prefix}/{key}", **TOLERANCE
                        )
                        compared += 1
            assert compared == (7 if module.registers else 5)


def test_positions_of_the_models(variants):
    for name, options, arrays, module, variables in variants():
        for height, width in options["sizes"]:
            rows, columns = height // module.patch_size, width // module.patch_size
            how = rows, columns, height == width, options["antialias"], options["offset"]
            ours = resize_pos_embed(variables["params"]["pos_embed"], *how)
            np.testing.assert_allclose(ours, arrays[f"{name}/{height}x{width}/pos"], err_msg=name, **TOLERANCE)


def test_positions_of_real_grids(golden2):
    arrays, _ = golden2("vit2")
    keys = [key for key in arrays if key.startswith("pos_grid")]
    assert keys
    for key in keys:
        grid, how, size = key.split("/")
        stored, patch = arrays[f"in/{grid}"], int(grid.rpartition("_p")[2])
        rows, columns = (int(pixels) // patch for pixels in size.split("x"))
        offset, antialias = float(how.split("_")[0].removeprefix("off")), how.endswith("aa1")
        square = len(set(size.split("x"))) == 1
        ours = resize_pos_embed(jnp.asarray(stored), rows, columns, square, antialias, offset)
        np.testing.assert_allclose(ours, arrays[key], err_msg=key, **TOLERANCE)


def test_the_offset_that_published_models_pair_with_antialiasing():
    positions = jax.random.normal(jax.random.key(0), (1, 26, 8))
    for antialias, offset in ((False, 0.1), (True, 0.0)):
        default = resize_pos_embed(positions, 3, 7, False, antialias)
        np.testing.assert_array_equal(default, resize_pos_embed(positions, 3, 7, False, antialias, offset))


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (50, 9), (38, 37)])
def test_antialiased_positions_are_those_of_jax_image_resize(rows, columns):
    positions = jax.random.normal(jax.random.key(0), (1, 1 + 37 * 37, 4))
    grid = positions[0, 1:].reshape(37, 37, 4)
    expected = jax.image.resize(grid, (rows, columns, 4), "cubic", antialias=True).reshape(-1, 4)
    ours = resize_pos_embed(positions, rows, columns, rows == columns, antialias=True)[0, 1:]
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_tokens_of_intermediate_blocks(variants):
    for name, options, arrays, module, variables in variants():
        height, width = options["sizes"][1 if len(options["sizes"]) > 1 else 0]
        images, _ = inputs(arrays, options, height, width)
        prefix = f"{name}/{height}x{width}"
        expected = {key.removeprefix(f"{prefix}/"): x for key, x in arrays.items() if key.startswith(f"{prefix}/inter")}
        blocks = module.apply(variables, images, module.depth, method="last_blocks")
        ours = {}
        for i, tokens in enumerate(module.apply(variables, images, 4, method="last_blocks")):
            ours |= {f"inter4_{i}_patch": tokens.patches, f"inter4_{i}_cls": tokens.cls}
        last = module.apply(variables, images, None, method=prenorm)[:, 1 + module.registers :]
        rows, columns = blocks[-1].grid
        ours["inter_last_nonorm_reshaped"] = last.reshape(len(last), rows, columns, -1).transpose(0, 3, 1, 2)
        ours |= {f"inter_list{i}_patch": tokens.patches for i, tokens in enumerate(blocks)}
        assert set(expected) <= set(ours)
        assert len(expected) >= 9
        for key, value in expected.items():
            np.testing.assert_allclose(ours[key], value, err_msg=f"{prefix}/{key}", **TOLERANCE)


def test_gradients(variants):
    for name, options, arrays, module, variables in variants():
        images, masks = inputs(arrays, options, *options["grad_size"])
        r = {kind: arrays.get(f"in/{name}/r_{kind}", 0) for kind in ("cls", "patch", "reg")}

        def objective(params, module=module, images=images, masks=masks, r=r):
            tokens = module.apply({"params": params}, images, masks=masks)
            return sum(
                jnp.sum(x * r[kind])
                for kind, x in (("cls", tokens.cls), ("patch", tokens.patches), ("reg", tokens.registers))
            )

        ours = official.to_official(jax.grad(objective)(variables["params"]))
        prefix = f"{name}/grad/"
        expected = official.unchunked({k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)})
        assert ours.keys() == expected.keys()
        for tensor, grad in expected.items():
            np.testing.assert_allclose(ours[tensor], grad, err_msg=f"{prefix}{tensor}", **TOLERANCE)


def test_hidden_widths(variants):
    for name, options, _, module, variables in variants():
        mlp = variables["params"]["blocks"]["mlp"]
        last = mlp["w3" if module.ffn == "swiglu" else "fc2"]
        assert last["kernel"].shape[1] == options["ffn_hidden"], name


def test_heads(golden2, rule_weights2):
    arrays, meta = golden2("head2")
    c, x, r = meta["config"], jnp.asarray(arrays["in/x"]), arrays["in/r"]
    for kind, facts in meta["kinds"].items():
        weights = rule_weights2(facts["shapes"], facts["weights_seed"], 1.0, facts.get("override"))
        layers = sum(name.startswith("mlp.") and name.endswith("weight") for name in weights)
        # Our layers always have biases: without them, they are 0 and stay out of the comparison.
        biases = {name.replace("weight", "bias"): len(w) for name, w in weights.items() if name.startswith("mlp")}
        weights = {name: np.zeros(n, np.float32) for name, n in biases.items() if name.endswith("bias")} | weights
        module = DINOHead(c["out_dim"], c["hidden_dim"], c["bottleneck_dim"], layers, norm_last_layer=False)
        variables = official.from_official(jax.eval_shape(module.init, jax.random.key(0), x), weights, kind)

        def objective(params, x, module=module):
            out = module.apply({"params": params}, x)
            return jnp.sum(out * r), out

        (grads, grad_x), out = jax.grad(objective, argnums=(0, 1), has_aux=True)(variables["params"], x)
        np.testing.assert_allclose(out, arrays[f"{kind}/out"], err_msg=kind, **TOLERANCE)
        np.testing.assert_allclose(grad_x, arrays[f"{kind}/grad_x"], err_msg=kind, **TOLERANCE)
        prefix, ours = f"{kind}/grad/", official.to_official(grads)
        expected = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        assert expected
        for name, grad in expected.items():
            np.testing.assert_allclose(ours[name], grad, err_msg=f"{kind} {name}", **TOLERANCE)


def test_stochastic_depth_of_a_subset_is_a_factor_for_each_image(golden2, rule_weights2):
    arrays, meta = golden2("drop2")
    c, x, r = meta["config"], jnp.asarray(arrays["in/x"]), arrays["in/r"]
    module = Block(c["heads"], 4 * c["dim"], jnp.float32, layer_scale=1.0)
    for name, facts in meta["blocks"].items():
        weights = rule_weights2(facts["shapes"], facts["weights_seed"], 1.0)
        stacked = {f"blocks.0.{tensor}": w for tensor, w in weights.items()}
        like = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, None, False), x)["params"]
        like = {"params": {"blocks": jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype), like)}}
        params = jax.tree.map(lambda w: w[0], official.from_official(like, stacked, name)["params"]["blocks"])
        B = len(x)
        kept = [arrays[f"{name}/kept_{branch}"] for branch in ("attn", "ffn")]
        factors = jnp.stack([jnp.zeros(B).at[rows].set(B / len(rows)) for rows in kept])

        def objective(params, x, factors=factors):
            out = module.apply({"params": params}, x, factors, False)[0]
            return jnp.sum(out * r), out

        (grads, grad_x), out = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)
        np.testing.assert_allclose(out, arrays[f"{name}/out"], err_msg=name, **TOLERANCE)
        np.testing.assert_allclose(grad_x, arrays[f"{name}/grad_x"], err_msg=name, **TOLERANCE)
        prefix, ours = f"{name}/grad/", official.to_official(grads)
        expected = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        assert expected
        for tensor, grad in expected.items():
            np.testing.assert_allclose(ours[tensor], grad, err_msg=f"{name} {tensor}", **TOLERANCE)


def test_initial_values_are_those_of_dinov2():
    module = ViT(384, 2, 6, patch_size=14, image_size=224, registers=4, layer_scale=1e-5, ffn="swiglu", mask_token=True)
    params = module.init(jax.random.key(0), jnp.zeros((1, 14, 14, 3)))["params"]
    ours = official.to_official(params)
    expected = {"cls_token": 1e-6, "register_tokens": 1e-6, "pos_embed": 0.02, "blocks.1.mlp.w12.weight": 0.02}
    for name, std in expected.items():
        assert ours[name].std() == pytest.approx(std, rel=0.15), name
    assert not ours["mask_token"].any()
    assert (ours["blocks.0.ls1.gamma"] == np.float32(1e-5)).all()
    assert ours["blocks.0.mlp.w12.weight"].shape == (2048, 384)
    plain = ViT(384, 1, 6, patch_size=14, image_size=28).init(jax.random.key(0), jnp.zeros((1, 14, 14, 3)))["params"]
    assert plain["cls_token"].std() == pytest.approx(0.02, rel=0.15)


def test_attention_rows_are_cls_registers_and_patches():
    module = ViT(32, 2, 4, patch_size=8, image_size=32, registers=3, layer_scale=0.5, ffn="swiglu")
    images = jax.random.normal(jax.random.key(0), (2, 16, 32, 3))
    variables = module.init(jax.random.key(1), images)
    attention = module.apply(variables, images, method="last_attention")
    assert attention.shape == (2, 4, 1 + 3 + 8, 1 + 3 + 8)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    tokens = module.apply(variables, images, 2, method="last_blocks")
    assert [t.registers.shape for t in tokens] == [(2, 3, 32)] * 2
    assert [t.patches.shape for t in tokens] == [(2, 8, 32)] * 2
