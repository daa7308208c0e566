"""Golden weights by rule, numpy only: the same arrays with or without torch.

make(shapes, seed, gain): `shapes` maps state_dict names to shapes. One
np.random.default_rng(seed); names are visited in sorted() order; each one draws
a = rng.standard_normal(shape) (float64; names ending in num_batches_tracked draw
nothing and are left out), then, first match wins:
  *.running_var        1 + 0.1*|a|          *.running_mean   0.1*a
  *.weight_g           1 + 0.1*a            *.bias           0.1*a
  *pos_embed, *cls_token   0.5*a            1-D (norm scale) 1 + 0.1*a
  anything else        gain / sqrt(prod(shape[1:])) * a
and is cast to float32. `override` (name -> constant) replaces values after drawing.
"""

import numpy as np


def make(shapes, seed, gain=1.0, override=None):
    rng = np.random.default_rng(seed)
    out = {}
    for n in sorted(shapes):
        if n.endswith("num_batches_tracked"):
            continue
        s = tuple(shapes[n])
        a = rng.standard_normal(s)
        if n.endswith("running_var"):
            a = 1 + 0.1 * np.abs(a)
        elif n.endswith("running_mean") or n.endswith(".bias"):
            a = 0.1 * a
        elif n.endswith("weight_g"):
            a = 1 + 0.1 * a
        elif n.endswith("pos_embed") or n.endswith("cls_token"):
            a = 0.5 * a
        elif len(s) == 1:
            a = 1 + 0.1 * a
        else:
            a = a * (gain / np.sqrt(np.prod(s[1:])))
        if override and n in override:
            a = np.full(s, override[n])
        out[n] = a.astype(np.float32)
    return out
