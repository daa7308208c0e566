"""Converts parameter trees to and from the official PyTorch names (timm's for ViTs, torchvision's for ResNets).

Under official names, arrays have torch's layout: kernels are [out, in] and OIHW, and each block has its own tensors.
The conversion only transposes and stacks, so a round trip is bit-exact.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dino_jax.errors import UserError
from dino_jax.models import DINOHead, from_card
from dino_jax.models.registry import (
    CHANNELS_A_HEAD,
    RESNET,
    XCIT,
    architecture_card,
    names_of,
    resnet_name,
    vit_heads,
    vit_name,
    xcit_name,
)

LAYER_SCALE = 1e-5  # DINOv2's initial factors
NAMED = 12  # names of each kind that an error lists


def to_official(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters or statistics of one module (backbone or head) -> arrays by official name."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(tree):
        names, leaf = _names(path, tree, depth=len(leaf)), np.asarray(leaf)
        layers = leaf if path[0] == "blocks" else leaf[None]
        tensors |= {name: _torch_layout(path, layer) for name, layer in zip(names, layers, strict=True)}
    return tensors


def from_official(like: Mapping[str, Any], tensors: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    """Arrays by official name -> float32 variables with the structure of `like` ({"params", "batch_stats"}).

    Ignores torch's `num_batches_tracked`, a counter that nothing reads. Raises UserError if a tensor holds integers or
    non-finite values, or if tensors of `source` are missing, unused or have another shape; the message lists them.
    """
    places = [(path, _names(path[1:], like[path[0]], depth=leaf.shape[0]), leaf) for path, leaf in _leaves(like)]
    expected = {
        name: _torch_shape(path[1:], leaf.shape[1:] if path[1] == "blocks" else leaf.shape)
        for path, names, leaf in places
        for name in names
    }
    _require_same(expected, {name: x.shape for name, x in tensors.items() if not _is_counter(name)}, source)
    variables: dict[str, Any] = {collection: {} for collection in like}
    for path, names, leaf in places:
        layers = [_our_layout(path[1:], tensors[name]) for name in names]
        stacked = np.stack(layers, dtype=np.float32, casting="same_kind")
        if layers[0].dtype.kind in "iub" or not np.isfinite(stacked).all():
            raise UserError(
                f"{source} has numbers in {_listed(names)} that are not finite weights: download or copy the file again"
            )
        node = variables
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = stacked.reshape(leaf.shape)
    return variables


# Networks that look like ours but compute something else: a tensor's name -> what the file holds.
FOREIGN = (
    (r"rope_embed|storage_tokens", "a DINOv3 ViT"),
    (r"\bgamma_1$", "a BEiT or CaiT"),
    (r"dist_token|distillation_token", "a distilled DeiT"),
    (r"\.se\.|\.fc1\..*\.se", "a squeeze-and-excitation ResNet"),
    (r"^conv1\.[03]\.", "a ResNet with a deep stem"),
    (r"\.aa\.|blur_?pool|downsample\.2\.", "a ResNet with anti-aliasing or another downsampling"),
)


def refuse_antialiased(name: str, source: str) -> None:
    """Raises UserError if the name of a file or architecture is that of an anti-aliased ResNet.

    timm's resnetblur50 and resnetaa50 filter without parameters, so their tensors are those of a plain ResNet-50.
    """
    if re.match(r"resnet(blur|aa)", name):
        raise UserError(f"{source} holds {name}, a ResNet with anti-aliasing, which is not supported: give a plain one")


def backbone_architecture(tensors: Mapping[str, np.ndarray], source: str, num_heads: Any = None) -> dict[str, Any]:
    """Infers the "architecture" section of a model card (see `registry.architecture_card`) from the tensors' shapes.

    A ViT whose width, depth or number of heads matches no named architecture is arch `vit`. A ResNet's image_size is
    set to 224, because its tensors do not show it.

    Args:
        tensors: arrays of one backbone by official name.
        source: name of the file, for messages.
        num_heads: attention heads of a ViT, which no tensor shows, as stated by the file or the user. None: the heads
            of the named ViT with this width and depth, else embed_dim / 64, which is reported on stderr.

    Raises:
        UserError: the tensors belong to another kind of network, or the width is not a multiple of the heads.
    """
    for pattern, what in FOREIGN:
        if found := next((name for name in tensors if re.search(pattern, name)), None):
            raise UserError(
                f"{source} holds {what} ({_listed([found])}), which is not supported: give a ViT of DINO, DINOv2, "
                "DeiT or timm's plain vit_*, or a ResNet"
            )
    if "cls_token" in tensors and "pos_embed" in tensors and "patch_embed.proj.weight" in tensors:
        return _vit_architecture(tensors, source, num_heads)
    if "cls_attn_blocks.0.attn.qkv.weight" in tensors and "patch_embed.proj.0.0.weight" in tensors:
        return _xcit_architecture(tensors, source)
    if "conv1.weight" in tensors:
        return _resnet_architecture(tensors, source)
    raise UserError(
        f"{source} holds no known backbone ({_listed(list(tensors))}): give a DINO or DINOv2 ViT, an XCiT or a ResNet "
        "with the tensor names of the official code, timm, torchvision or Hugging Face"
    )


def backbone_like(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shapes of the variables {"params", "batch_stats"} of a card's architecture."""
    size, channels = architecture["image_size"], architecture["in_channels"]
    return _shapes(from_card(architecture), (1, size, size, channels))


def head_like(tensors: Mapping[str, np.ndarray], embed_dim: int) -> dict[str, Any]:
    """Infers a projection head from its tensors and returns the shapes of its variables, including the gain."""
    mlp = sorted(
        (name for name, x in tensors.items() if re.fullmatch(r"mlp\.(\d+\.)?weight", name) and x.ndim == 2),
        key=lambda name: int("".join(filter(str.isdigit, name)) or 0),
    )
    prototypes = tensors.get("last_layer.weight_v")
    head = DINOHead(
        out_dim=1 if prototypes is None or not prototypes.ndim else prototypes.shape[0],
        hidden_dim=tensors[mlp[0]].shape[0] if mlp else 1,
        bottleneck_dim=tensors[mlp[-1]].shape[0] if mlp else 1,
        layers=max(len(mlp), 1),
        use_bn=any(name.endswith("running_mean") for name in tensors),
        norm_last_layer=False,
    )
    return _shapes(head, (1, embed_dim))


def renamed(tensors: Mapping[str, np.ndarray], rule: Callable[[str], str]) -> dict[str, np.ndarray]:
    """Renames the tensors by `rule`. Raises UserError if two of them get the same name."""
    new = {rule(name): x for name, x in tensors.items()}
    if len(new) < len(tensors):
        seen: dict[str, str] = {}
        first, second = next((seen[rule(name)], name) for name in tensors if seen.setdefault(rule(name), name) != name)
        raise UserError(f"two tensors map to the same parameter: {_listed([first, second])}; remove one of them")
    return new


def unchunked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the blocks of DINOv2's training checkpoints, blocks.CHUNK.BLOCK.*, to blocks.BLOCK.*."""
    return renamed(tensors, lambda name: re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name))


def with_counters(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds `num_batches_tracked` = 0 next to running statistics, because torch's strict loading requires it."""
    counters = [name.replace("running_mean", "num_batches_tracked") for name in tensors if "running_mean" in name]
    return {**tensors, **{name: np.zeros((), np.int64) for name in counters}}


def _vit_architecture(tensors: Mapping[str, np.ndarray], source: str, num_heads: Any) -> dict[str, Any]:
    kernel, pos_embed = tensors["patch_embed.proj.weight"].shape, tensors["pos_embed"].shape
    if len(kernel) != 4 or len(pos_embed) != 3 or 0 in kernel or pos_embed[1] < 2:
        raise UserError(
            f"{source} has a patch embedding {kernel} and positions {pos_embed}, which do not form a ViT: "
            "download or copy the file again"
        )
    embed_dim, in_channels, rows, columns = kernel
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    if not depth:
        raise UserError(f"{source} has a ViT's embeddings but no blocks: download or copy the file again")
    positions = pos_embed[1] - 1
    side = round(positions**0.5)
    if rows != columns or side * side != positions:
        raise UserError(
            f"{source} has patches of {rows} x {columns} pixels and {positions} patch positions: only square patches "
            "and grids are supported"
        )
    heads = _default_heads(embed_dim, depth, source) if num_heads is None else num_heads
    if type(heads) is not int or heads < 1 or embed_dim % heads:
        raise UserError(f"{source}: {heads!r} attention heads do not divide its width {embed_dim}: correct num_heads")
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": heads}
    arch = vit_name(sizes)
    return architecture_card(
        arch,
        patch_size=rows,
        in_channels=in_channels,
        image_size=side * rows,
        sizes=sizes if arch == "vit" else None,
        **_vit_variant(tensors),
    )


def _vit_variant(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns `registry.VARIANT`, with DINOv2's initial factors, which no tensor shows."""
    tokens = tensors.get("register_tokens")
    registers = 0 if tokens is None else tokens.shape[1] if tokens.ndim == 3 else 1
    scaled = any(re.fullmatch(r"blocks\.\d+\.ls1\.gamma", name) for name in tensors)
    mask_token = "mask_token" in tensors
    return {
        "registers": registers,
        "layer_scale": LAYER_SCALE if scaled else 0.0,
        "ffn": "swiglu" if any(".mlp.w12." in name for name in tensors) else "mlp",
        "antialias": assumed_antialias(registers, scaled, mask_token),
        "mask_token": mask_token,
    }


def assumed_antialias(registers: int, scaled: bool, mask_token: bool) -> bool:
    """Returns whether a ViT resizes positions with antialiasing, if its file does not say so.

    Released models with registers do, those without do not; timm always does. Of files with LayerScale, only timm's
    have no mask token.
    """
    return registers > 0 or (scaled and not mask_token)


def _default_heads(embed_dim: int, depth: int, source: str) -> int:
    """Returns the number of heads assumed for a ViT whose file does not state it."""
    if named := vit_heads(embed_dim, depth):
        return named
    known = f"{source} is a ViT of width {embed_dim} and depth {depth} that does not state its number of heads"
    if embed_dim % CHANNELS_A_HEAD:
        raise UserError(
            f"{known}: give num_heads (load_backbone(path, num_heads=N), --num_heads=N, or, for init_from, "
            "--config.model.num_heads=N)"
        )
    heads = embed_dim // CHANNELS_A_HEAD
    print(
        f"{known}: {heads} are assumed (width / {CHANNELS_A_HEAD}); if that is wrong, give num_heads", file=sys.stderr
    )
    return heads


def _resnet_architecture(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    refuse_antialiased(source, source)
    stem, kernels = tensors["conv1.weight"], 3 if "layer1.0.conv3.weight" in tensors else 2
    stages = [{name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    blocks = tuple(len(stage) for stage in stages)
    arch = resnet_name(blocks, kernels)
    if arch is None or stem.ndim != 4:
        raise UserError(
            f"{source} is a ResNet with {blocks} blocks of {kernels} convolutions, "
            f"which is none of {', '.join(names_of(RESNET))}: give one of those"
        )
    if (width := len(tensors.get("layer1.0.conv1.weight", stem))) != len(stem):
        raise UserError(
            f"{source} is a ResNeXt or a wide ResNet ({width} channels in its first block), which is not supported: "
            f"give one of {', '.join(names_of(RESNET))}"
        )
    return architecture_card(arch, in_channels=stem.shape[1], image_size=224)


def _xcit_architecture(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    embed_dim = tensors["cls_attn_blocks.0.attn.qkv.weight"].shape[-1]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    convolutions = len({name.split(".")[2] for name in tensors if name.startswith("patch_embed.proj.")})
    arch, first = xcit_name(embed_dim, depth), tensors["patch_embed.proj.0.0.weight"]
    if arch is None or first.ndim != 4 or 2**convolutions not in XCIT.patch_sizes:
        raise UserError(
            f"{source} is an XCiT of width {embed_dim} and depth {depth} with {convolutions} convolutions, "
            f"which is none of {', '.join(names_of(XCIT))}: give one of those"
        )
    return architecture_card(arch, patch_size=2**convolutions, in_channels=first.shape[1], image_size=224)


def _shapes(module: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield tuple(entry.key for entry in path), leaf


def _names(path: tuple[str, ...], tree: Mapping[str, Any], depth: int) -> list[str]:
    """Returns the official names of a leaf of `tree`: one name, or one per block for the stacked `blocks`."""
    if path[0] == "blocks":
        return [f"blocks.{i}.{_name(path[1:], tree)}" for i in range(depth)]
    return [_name(path, tree)]


def _name(path: tuple[str, ...], tree: Mapping[str, Any]) -> str:
    """("mlp_1", "kernel") -> "mlp.2.weight"."""
    use_bn = any(key.startswith("bn_") for key in tree)
    stride = 3 if use_bn else 2  # the head's MLP is a sequence of linear, (batch norm,) GELU, ...
    single = "mlp_0" in tree and "mlp_1" not in tree  # ... but a plain layer if it has only one
    rules: list[tuple[str, Any]] = [
        (r"^layer(\d)_(\d+)\.", r"layer\1.\2."),
        (r"^block(\d+)\.", r"blocks.\1."),
        (r"^cls_attn_block(\d+)\.", r"cls_attn_blocks.\1."),
        (r"^patch_embed_(conv|bn)(\d)\.", lambda m: f"patch_embed.proj.{2 * int(m[2])}.{int(m[1] == 'bn')}."),
        (r"^pos_embedder\.", "pos_embeder.token_projection."),  # spelled so there
        (r"\.(gamma\d)\.gamma$", r".\1"),
        (r"downsample_conv", "downsample.0"),
        (r"downsample_bn", "downsample.1"),
        (r"^patch_embed\.(?!proj)", "patch_embed.proj."),
        (r"^mlp_(\d+)\.", lambda m: "mlp." if single else f"mlp.{stride * int(m[1])}."),
        (r"^bn_(\d+)\.", lambda m: f"mlp.{stride * int(m[1]) + 1}."),
        (r"(kernel|scale)$", "weight"),
        (r"\b(mean|var)$", r"running_\1"),
    ]
    name = ".".join(path)
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _torch_layout(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    """Transposes kernels HWIO -> OIHW and [in, out] -> [out, in]; reshapes the prototypes' gain [K] -> [K, 1]."""
    if path[-1] == "kernel":
        return x.transpose((3, 2, 0, 1) if x.ndim == 4 else (1, 0))
    return x[:, None] if path[-1] == "weight_g" else x


def _our_layout(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":
        return x.transpose((2, 3, 1, 0) if x.ndim == 4 else (1, 0))
    return x[:, 0] if path[-1] == "weight_g" else x


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return _torch_layout(path, np.broadcast_to(np.float32(0), shape)).shape


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _require_same(expected: Mapping[str, tuple[Any, ...]], given: Mapping[str, tuple[Any, ...]], source: str) -> None:
    wrong = [
        f"{name} {given[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in given],
        "not used": [name for name in given if name not in expected],
        "of another shape": wrong,
    }
    parts = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if parts:
        raise UserError(f"the tensors of {source} are not those of its architecture; {'; '.join(parts)}")


def _listed(names: list[str]) -> str:
    names = [ascii(name[:100])[1:-1] for name in names]  # names come from a file and may hold anything
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
