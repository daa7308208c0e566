"""Checks that all processes run the same program on the same data, and that all devices hold the same state.

Processes that disagree do not fail on their own: each one computes a share of a different problem, and averaging the
gradients hides it. Therefore the processes compare settings, data and program at the start, and states periodically.
"""

import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from dino_jax import provenance
from dino_jax.data.sources import Source, names_digest
from dino_jax.distributed import fsdp, sharding
from dino_jax.errors import NAMED, UserError, listed

# Settings that may differ between hosts, and paths. The contents of a path are compared when they are read.
PER_HOST = (
    *("distributed.", "data.workers", "data.source", "init_from", "evals.knn.train", "evals.knn.test"),
    *("workers", "train", "test", "source"),  # of the evaluation protocols
)


def require_same(describe: Callable[[], Mapping[str, Any]]) -> None:
    """Raises UserError on every process, listing the differences, unless describe() is the same on all processes.

    describe: returns plain JSON values by name, with the same names on all processes. It is not called if there is only
    one process.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(describe(), sort_keys=True).encode()
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text).digest(), np.uint8))
    if (digests == digests[0]).all():
        return
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(sizes.max()), np.uint8)
    descriptions = [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
    raise UserError(
        f"the processes do not agree: {listed(differences(descriptions))}: start the same command with the same code, "
        "libraries and data on every host"
    )


def differences(descriptions: list[Mapping[str, Any]]) -> list[str]:
    """Descriptions of all processes, in order -> a message for each name whose values differ."""
    messages = []
    for name in sorted(set().union(*descriptions)):
        values = [json.dumps(description.get(name)) for description in descriptions]
        usual = Counter(values).most_common(1)[0][0]
        deviating = [process for process, value in enumerate(values) if value != usual]
        if deviating:
            other = values.index(usual)
            listing = ", ".join(f"process {process} has {values[process]}" for process in deviating[:NAMED])
            messages.append(f"{name} ({listing}, process {other} {usual})")
    return messages


def settings(config: Any) -> dict[str, Any]:
    """Returns the config by dotted name without `PER_HOST`, versions, a hash of our code, devices and XLA_FLAGS."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]
    return {
        name: value
        for name, value in provenance.flat(provenance.plain(config)).items()
        if not name.startswith(PER_HOST)
    } | {
        **{f"version of {name}": version for name, version in provenance.versions().items()},
        "version of jaxlib": importlib.metadata.version("jaxlib"),
        "code of dino_jax": _code(),
        "devices of a host": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "XLA_FLAGS": " ".join(flags),
    }


def data(source: Source) -> dict[str, Any]:
    """Returns the number of images of config.data.source, and a hash of their names in order."""
    return {"images of data.source": len(source), "names of images of data.source": names_digest(source)}


def program(lowered: jax.stages.Lowered) -> dict[str, str]:
    """Returns a hash of a jitted function that is lowered for its arguments but not yet compiled."""
    return {"compiled step": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]}


def require_same_state(state: Any, mesh: Mesh) -> None:
    """Raises UserError, naming the devices, if any device's copy of the state differs in a bit from most others.

    state: a tree of arrays sharded by `fsdp.specs`. Each part of a parameter that is split over `fsdp` is compared with
    the same part on other devices. This is a collective: all processes must call it.
    """
    if mesh.shape["data"] == 1:
        return
    sums = np.asarray(multihost_utils.process_allgather(checksums(mesh, state), tiled=True))
    data_size, fsdp, _ = sums.shape
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(state)]
    wrong = []
    for part in range(fsdp):
        usual = Counter(row.tobytes() for row in sums[:, part]).most_common(1)[0][0]
        for copy in range(data_size):
            where = np.flatnonzero(sums[copy, part] != np.frombuffer(usual, np.uint32))
            if where.size:
                device = mesh.devices[copy, part]
                wrong.append(
                    f"{device} of process {device.process_index} in {names[where[0]]} and {where.size - 1} more"
                )
    if wrong:
        raise UserError(
            f"devices hold different copies of the state: {'; '.join(wrong[:NAMED])} ({len(wrong)} of "
            f"{mesh.devices.size} devices): the same command resumes from the last checkpoint; if it happens again, "
            "exclude the machine"
        )


@partial(jax.jit, static_argnums=0)
def checksums(mesh: Mesh, state: Any) -> jax.Array:
    """Returns the sum of the bits, read as integers, of each device's copy of each array: uint32 [data, fsdp, arrays].

    The sum wraps around. It does not depend on the order of the elements, and any single flipped bit changes it.
    """

    def own(state: Any) -> jax.Array:
        return jnp.stack([_bits(x).sum(dtype=jnp.uint32) for x in jax.tree.leaves(state)])[None, None]

    return jax.shard_map(
        own, mesh=mesh, in_specs=(fsdp.specs(state),), out_specs=PartitionSpec(*sharding.AXES), check_vma=False
    )(state)


def _bits(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned)


def _code() -> str:
    """Returns a hash of this package's sources, because checkouts of the same version may differ."""
    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return code.hexdigest()[:16]
