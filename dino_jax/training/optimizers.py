"""From gradients to updates: per-tensor clip, decay mask, last-layer freeze, and AdamW, SGD or LARS.

`build` makes an optax transformation from *this step's* learning rate and weight decay, so the schedules stay plain
functions of the step and the optimizer's state holds moments only.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("adamw", "sgd", "lars")

NOT_DECAYED = ("bias", "scale")  # biases and the gains of norms; cls_token and pos_embed do decay


def map_tensors(fn: Callable, *trees):
    """fn over the tensors of parameter trees, where the scanned blocks' leading depth axis is `depth` tensors.

    Anything that looks at a whole tensor (its norm) must treat the layers of a stack one by one.
    """

    def apply(path, *leaves):
        stacked = any(key.key == "blocks" for key in path)
        return jax.vmap(fn)(*leaves) if stacked else fn(*leaves)

    return jax.tree.map_with_path(apply, *trees)


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norm of all of a tensor; unlike one of `x.ravel()`, without gathering what devices hold in parts."""
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def decay_mask(params):
    """True where weight decay applies: everything but biases and the gains of norms."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def clip_by_tensor_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales *each tensor's* gradient to norm at most `max_norm` (dino `utils.clip_gradients`); 0 switches it off."""
    if not max_norm:
        return optax.identity()

    def clip(g):
        return g * jnp.minimum(1.0, max_norm / (norm(g) + 1e-6))

    return optax.stateless(lambda updates, params: map_tensors(clip, updates))


def trust_ratio(eta: float = 0.001) -> optax.GradientTransformation:
    """LARS (You et al., 2017): each decayed tensor's update becomes eta * |weights| / |update| of its own length."""

    def scale(update, param):
        param_norm, update_norm = norm(param), norm(update)
        usable = (param_norm > 0) & (update_norm > 0)
        return update * jnp.where(usable, eta * param_norm / jnp.where(usable, update_norm, 1), 1)

    return optax.masked(optax.stateless(partial(map_tensors, scale)), decay_mask)


def frozen_when(frozen: jax.Array, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transformation`, except that where `frozen` nothing happens: no update, no decay, no change of its state."""

    def update(updates, state, params):
        new_updates, new_state = transformation.update(updates, state, params)
        return (
            jax.tree.map(lambda u: jnp.where(frozen, 0, u), new_updates),
            jax.tree.map(lambda old, new: jnp.where(frozen, old, new), state, new_state),
        )

    return optax.GradientTransformation(transformation.init, update)


def build(optim, lr=0.0, weight_decay=0.0, last_layer_frozen=False) -> optax.GradientTransformation:
    """The optimizer `optim.name` for one step over {"backbone": ..., "head": {..., "last_layer": ...}}.

    All but `optim` may be traced, and none of them shapes the state: `build(optim).init(params)` makes it. The last
    layer has a state of its own (with its own Adam step count), which stands still while it is frozen: the reference
    hands torch no gradient for it then.
    """
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    transform = {
        "adamw": optax.chain(optax.scale_by_adam(), decay),
        "sgd": optax.chain(decay, optax.trace(0.9)),
        "lars": optax.chain(decay, trust_ratio(), optax.trace(0.9)),
    }[optim.name]
    transform = optax.chain(transform, optax.scale(-lr))

    def labels(params):
        return jax.tree.map_with_path(
            lambda path, _: "last_layer" if any(key.key == "last_layer" for key in path) else "body", params
        )

    return optax.chain(
        clip_by_tensor_norm(optim.clip_grad),
        optax.partition({"body": transform, "last_layer": frozen_when(last_layer_frozen, transform)}, labels),
    )
