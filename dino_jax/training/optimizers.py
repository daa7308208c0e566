"""From gradients to updates: per-tensor clip, decay mask, last-layer freeze, and AdamW, SGD or LARS.

`build` makes an optax transformation from *this step's* learning rate and weight decay, so the schedules stay plain
functions of the step and the optimizer's state holds moments only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("adamw", "sgd", "lars")

NOT_DECAYED = ("bias", "scale", "gamma")  # biases, norms and LayerScale; cls_token and pos_embed do decay


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
    optim: Any, lr: Any = 0.0, weight_decay: Any = 0.0, last_layer_frozen: Any = False
) -> optax.GradientTransformation:
    """The optimizer `optim.name` for one step over {"backbone": ..., "head": {..., "last_layer": ...}}.

    optim: config.optim. The other arguments may be traced, and do not affect the state: `build(optim).init(params)`
    creates it. The last layer has a state of its own (with its own Adam step count), which stands still while the layer
    is frozen, because the reference then gives torch no gradient for it.
    """
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    transform = {
        "adamw": optax.chain(optax.scale_by_adam(), decay),
        "sgd": optax.chain(decay, optax.trace(0.9)),
        "lars": optax.chain(decay, trust_ratio(), optax.trace(0.9)),
    }[optim.name]
    transform = optax.chain(transform, optax.scale(-lr))

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "last_layer" if any(key.key == "last_layer" for key in path) else "body", params
        )

    return optax.chain(
        clip_by_tensor_norm(optim.clip_grad),
        optax.partition({"body": transform, "last_layer": frozen_when(last_layer_frozen, transform)}, labels),
    )
