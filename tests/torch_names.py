"""Our parameter trees from and to the reference's state_dict names, for the golden tests."""

import re

import jax
import numpy as np


def _torch_name(path: str, use_bn: bool, layers: int) -> str:
    """Our path ("mlp_1/kernel") -> the reference's name ("mlp.2.weight")."""
    stride = 3 if use_bn else 2
    rules = [
        (r"^(conv\d|bn1)/", r"\1."),
        (r"^layer(\d)_(\d)/", r"layer\1.\2."),
        (r"downsample_conv", "downsample.0"),
        (r"downsample_bn", "downsample.1"),
        (r"^patch_embed/", "patch_embed.proj."),
        (r"^mlp_(\d)/", lambda m: "mlp." if layers == 1 else f"mlp.{stride * int(m[1])}."),
        (r"^bn_(\d)/", lambda m: f"mlp.{stride * int(m[1]) + 1}."),
        (r"(kernel|scale)$", "weight"),
        (r"\b(mean|var)$", r"running_\1"),
        (r"/", "."),
    ]
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def _transpose(x, inverse=False):
    """HWIO <-> OIHW convolutions, [in, out] <-> [out, in] matrices."""
    if x.ndim == 4:
        return x.transpose((2, 3, 1, 0) if inverse else (3, 2, 0, 1))
    return x.T if x.ndim == 2 else x


def _keeps_shape(name):
    return name.endswith(("cls_token", "pos_embed", "weight_v"))


def from_torch(template, arrays, prefix="", use_bn=False, layers=3):
    """Arrays by reference name -> a tree like `template` (of one module: a backbone or a head)."""

    def leaf(path, like):
        ours = "/".join(k.key for k in path)
        if ours.startswith("blocks/"):
            name = _torch_name(ours[len("blocks/") :], use_bn, layers)
            return np.stack([_transpose(arrays[f"{prefix}blocks.{i}.{name}"], True) for i in range(like.shape[0])])
        name = prefix + _torch_name(ours, use_bn, layers)
        if name.endswith("weight_g"):
            return arrays[name][:, 0]
        x = arrays[name]
        x = x if _keeps_shape(name) else _transpose(x, True)
        assert x.shape == like.shape, (name, x.shape, like.shape)
        return x

    return jax.tree.map_with_path(leaf, template)


def to_torch(tree, prefix="", use_bn=False, layers=3):
    """A tree of one module -> arrays by reference name."""
    out = {}
    for path, x in jax.tree.leaves_with_path(tree):
        ours, x = "/".join(k.key for k in path), np.asarray(x)
        if ours.startswith("blocks/"):
            name = _torch_name(ours[len("blocks/") :], use_bn, layers)
            out |= {f"{prefix}blocks.{i}.{name}": _transpose(layer) for i, layer in enumerate(x)}
            continue
        name = _torch_name(ours, use_bn, layers)
        if name.endswith("weight_g"):
            x = x[:, None]
        elif not _keeps_shape(name):
            x = _transpose(x)
        out[prefix + name] = x
    return out
