"""Counts the FLOPs of a function, and lists the peak rates of devices."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

# Peak dense FLOP/s of one JAX device in bfloat16 with float32 accumulation, by `device_kind`. These are the vendors'
# figures (NVIDIA's data sheets without sparsity, Google Cloud's TPU pages), which no real program reaches. V100 and T4
# do not support bfloat16; their figures are for float16.
PEAK_FLOPS = {
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla T4": 65e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the vendor's peak FLOP/s of a device (see PEAK_FLOPS), or None if it is not listed, such as a CPU."""
    return PEAK_FLOPS.get(device.device_kind)


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Counts the FLOPs of `fn(*args)` over all devices: 2 per multiply-add of matrix products and convolutions.

    Arguments may be arrays or jax.ShapeDtypeStructs; the function is only traced. Loops of known length count every
    iteration (unlike XLA's own analysis), recomputation under remat counts where the jaxpr shows it, the body of a
    `while` counts once, and a `cond` counts its most expensive branch. Elementwise operations and hand-written kernels
    are ignored, as is usual for the utilization defined by PaLM (Chowdhery et al., 2022, appendix B).
    """
    return _total(jax.make_jaxpr(fn)(*args))


def _product_flops(equation: Any) -> int:
    params, out = equation.params, equation.outvars[0].aval
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval
        return 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)
    kernel = equation.invars[1].aval
    taps = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    # Zeros that a transposed convolution inserts between its inputs do not count.
    return 2 * out.size * taps // math.prod(params["lhs_dilation"])


def _total(jaxpr: Any) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        return _product_flops(equation)
    inner = [_total(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":  # its jaxpr computes one device's share
        return sum(inner) * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return sum(inner)


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for param in params.values():
        for value in param if isinstance(param, tuple | list) else (param,):
            if hasattr(value, "eqns"):
                yield value
