"""From gradients to updates: clipping, decay mask, layer decay, last-layer freeze, and AdamW, SGD or LARS.

`build` makes an optax transformation from *this step's* learning rate and weight decay, so the schedules stay plain
functions of the step and the optimizer's state holds moments only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

OPTIMIZERS = ("adamw", "sgd", "lars")

CLIPS = ("tensor", "module")  # config.optim.clip_by: DINO's and DINOv2's
FREEZES = ("gradient", "lr")  # config.optim.freeze_by: DINO's and DINOv2's

NOT_DECAYED = ("bias", "scale", "gamma")  # biases and the gains of norms and of LayerScale; tokens and positions decay
FIRST_LAYERS = ("patch_embed", "cls_token", "pos_embed", "mask_token", "register_tokens")


def map_tensors(fn: Callable[..., jax.Array], *trees: Any) -> Any:
    """fn over the tensors of parameter trees, where the scanned blocks' leading depth axis is `depth` tensors.

    Anything that depends on a full tensor, such as its norm, must treat the layers of a stack one by one.
    """

    def apply(path: Any, *leaves: jax.Array) -> jax.Array:
        stacked = any(key.key == "blocks" for key in path)
        return jax.vmap(fn)(*leaves) if stacked else fn(*leaves)

    return jax.tree.map_with_path(apply, *trees)


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm of a tensor. Unlike the norm of `x.ravel()`, it does not gather split arrays."""
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but biases and the factors of norms and LayerScale."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def clip_by_tensor_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales *each tensor's* gradient to norm at most `max_norm` (dino `utils.clip_gradients`); 0 disables it."""
    if not max_norm:
        return optax.identity()

    def clip(g: jax.Array) -> jax.Array:
        return g * jnp.minimum(1.0, max_norm / (norm(g) + 1e-6))

    return optax.stateless(lambda updates, params: map_tensors(clip, updates))


def clip_by_module_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales the gradient of backbone and heads, each on its own, to norm at most `max_norm`; 0 disables it."""
    if not max_norm:
        return optax.identity()

    def clip(gradient: Any) -> Any:
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradient) + 1e-6))
        return jax.tree.map(lambda g: g * factor, gradient)

    return optax.stateless(lambda updates, params: {name: clip(part) for name, part in updates.items()})


def lr_multipliers(params: Any, layer_decay: float, patch_embed_lr: float) -> Any:
    """Returns each parameter's multiplier of the learning rate, one per layer [depth, 1, ...] for the stacked blocks.

    It is layer_decay ** (depth + 1 - layer): layer 0 are patch embedding, tokens and positions, block b (from 0) is
    layer b + 1, and the final norm and the heads have 1. That of the patch embedding is multiplied by patch_embed_lr.
    """
    depth = max((len(x) for path, x in jax.tree.leaves_with_path(params) if _has(path, "blocks")), default=0)

    def multiplier(path: Any, x: jax.Array) -> Any:
        if _has(path, "blocks"):
            return (layer_decay ** np.arange(depth, 0, -1, dtype=np.float32)).reshape(-1, *[1] * (x.ndim - 1))
        first = any(_has(path, name) for name in FIRST_LAYERS)
        alone = patch_embed_lr if _has(path, "patch_embed") else 1.0
        return np.float32(layer_decay ** (depth + 1 if first else 0) * alone)

    return jax.tree.map_with_path(multiplier, params)


def _has(path: Any, name: str) -> bool:
    return any(key.key == name for key in path)


def scale_by_lr(optim: Any, lr: Any, backbone_frozen: Any = False) -> optax.GradientTransformation:
    """Multiplies updates by -lr and, if config.optim asks for them, by `lr_multipliers` and 0 for a frozen backbone."""
    if optim.layer_decay == optim.patch_embed_lr == 1 and not optim.freeze_backbone_epochs:
        return optax.scale(-lr)
    backbone_lr = jnp.where(backbone_frozen, 0.0, lr)

    def scale(updates: Any, params: Any) -> Any:
        multipliers = lr_multipliers(params, optim.layer_decay, optim.patch_embed_lr)
        return {
            part: jax.tree.map(
                lambda u, multiplier, lr=backbone_lr if part == "backbone" else lr: u * (-lr * multiplier),
                updates[part],
                multipliers[part],
            )
            for part in updates
        }

    return optax.stateless(scale)


def trust_ratio(eta: float = 0.001) -> optax.GradientTransformation:
    """LARS (You et al., 2017): scales each decayed tensor's update by eta * |weights| / |update|.

    `optax.scale_by_trust_ratio` would take one norm over all layers of a stack, and gather split parameters for it.
    """

    def scale(update: jax.Array, param: jax.Array) -> jax.Array:
        param_norm, update_norm = norm(param), norm(update)
        usable = (param_norm > 0) & (update_norm > 0)
        return update * jnp.where(usable, eta * param_norm / jnp.where(usable, update_norm, 1), 1)

    return optax.masked(optax.stateless(partial(map_tensors, scale)), decay_mask)


def frozen_when(frozen: jax.Array, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transformation`, except that while `frozen` there is no update, no decay and no change of its state.

    `optax.conditionally_mask` would add a step counter of its own to the state, and so to checkpoints.
    """

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        new_updates, new_state = transformation.update(updates, state, params)
        return (
            jax.tree.map(lambda u: jnp.where(frozen, 0, u), new_updates),
            jax.tree.map(lambda old, new: jnp.where(frozen, old, new), state, new_state),
        )

    return optax.GradientTransformation(transformation.init, update)


def build(
    optim: Any,
    lr: Any = 0.0,
    weight_decay: Any = 0.0,
    last_layer_frozen: Any = False,
    backbone_frozen: Any = False,
) -> optax.GradientTransformation:
    """The optimizer `optim.name` for one step over {"backbone": ..., "head": {..., "last_layer": ...}}.

    optim: config.optim. The other arguments may be traced, and do not affect the state: `build(optim).init(params)`
    creates it. The last layer has a state of its own (with its own Adam step count). With config.optim.freeze_by
    "gradient", it stands still while the layer is frozen, because DINO's reference then gives torch no gradient for it;
    with "lr", as in DINOv2's, only the layer itself does.
    """
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    transform = {
        "adamw": optax.chain(optax.scale_by_adam(), decay),
        "sgd": optax.chain(decay, optax.trace(0.9)),
        "lars": optax.chain(decay, trust_ratio(), optax.trace(0.9)),
    }[optim.name]
    body = optax.chain(transform, scale_by_lr(optim, lr, backbone_frozen))
    if optim.freeze_by == "gradient":
        last_layer = frozen_when(last_layer_frozen, body)
    else:
        last_layer = optax.chain(transform, scale_by_lr(optim, jnp.where(last_layer_frozen, 0.0, lr)))
    clip = {"tensor": clip_by_tensor_norm, "module": clip_by_module_norm}[optim.clip_by](optim.clip_grad)

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "last_layer" if _has(path, "last_layer") else "body", params)

    return optax.chain(clip, optax.partition({"body": body, "last_layer": last_layer}, labels))
