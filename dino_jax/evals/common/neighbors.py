"""Exact nearest neighbors by cosine similarity among millions of rows, without the matrix of all similarities."""

import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dino_jax.distributed.sharding import AXES, BATCH, REPLICATED, make_mesh, replicate

# Bounds of a device's memory: rows of the bank in a chunk, similarities between a chunk and a group of queries.
BANK_CHUNK = 2**17
SIMILARITIES = 2**26
REPORT_EVERY = 10.0  # seconds


def nearest(bank: np.ndarray, queries: np.ndarray, k: int, mesh: Mesh | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k rows of a bank that are most similar to each query, best first; ties go to the lower row.

    Each device has a share of the bank and reads it once, in chunks; every chunk is compared with all queries. A device
    holds a chunk, the queries and their k best so far; the host holds little more than the inputs. Long searches print
    their progress to stderr.

    Args:
        bank: float32 [N, D], not necessarily normalized, the same on every process; may be memory-mapped.
        queries: float32 [T, D], not necessarily normalized, the same on every process.
        k: number of neighbors, 1..N.
        mesh: devices to use; all by default.

    Returns:
        cosine similarities float32 [T, k] and rows int32 [T, k].
    """
    mesh = make_mesh() if mesh is None else mesh
    share = -(-len(bank) // mesh.size)  # rows of each device
    chunks = -(-share // BANK_CHUNK)
    block = _block_size(-(-share // chunks), k)
    chunk = -(-share // (chunks * block)) * block
    groups = -(-len(queries) * chunk // SIMILARITIES)
    group = -(-len(queries) // (groups * mesh.size)) * mesh.size
    padding = groups * group - len(queries)
    placed = np.pad(np.asarray(queries, np.float32), ((0, padding), (0, 0))).reshape(groups, group, -1)
    placed, best = replicate(placed, mesh), _nothing_yet((groups, group, k), mesh)
    started = last = time.monotonic()
    for number in range(chunks):
        vectors = _place(bank, number * chunk, chunk, chunks * chunk, mesh)
        best = jax.block_until_ready(
            _search(best, placed, vectors, number * chunk, chunks * chunk, len(bank), block, mesh)
        )
        now = time.monotonic()
        if now - last > REPORT_EVERY and number + 1 < chunks:
            last, done = now, (number + 1) / chunks
            left = (now - started) / done * (1 - done)
            print(f"neighbors: {done:.0%} of {len(bank):,} rows searched, {left:,.0f} s left", file=sys.stderr)
    similarity, row = (np.asarray(x).reshape(groups * group, k)[: len(queries)] for x in _join(best, mesh))
    return similarity, row


def _block_size(chunk: int, k: int) -> int:
    """Returns the block size for `_contenders`: a power of two such that maxima and contenders are about as many."""
    return 2 ** max(0, round(np.log2(chunk / k) / 2))


def _nothing_yet(shape: tuple[int, int, int], mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Returns initial similarities and rows [devices, *shape], split over the devices."""
    sharding = NamedSharding(mesh, BATCH)
    empty = partial(jax.jit, out_shardings=(sharding, sharding))
    full = (mesh.size, *shape)
    return empty(lambda: (jnp.full(full, -jnp.inf), jnp.zeros(full, jnp.int32)))()


def _place(bank: np.ndarray, start: int, chunk: int, share: int, mesh: Mesh) -> jax.Array:
    """Returns `chunk` rows of each device's share of the bank, [devices, chunk, D], split over the devices.

    Beyond the end of the bank its last row is repeated, which does not change the largest similarity of its block.
    """

    def rows(index: Any) -> Any:
        first = index[0].indices(mesh.size)[0] * share + start
        if first + chunk <= len(bank):
            return np.asarray(bank[None, first : first + chunk], np.float32)
        return np.asarray(bank[np.minimum(np.arange(first, first + chunk), len(bank) - 1)][None], np.float32)

    return jax.make_array_from_callback((mesh.size, chunk, bank.shape[1]), NamedSharding(mesh, BATCH), rows)


def _normalize(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames=("share", "rows", "block", "mesh"), donate_argnums=0)
def _search(
    best: Any, queries: jax.Array, vectors: Any, start: jax.Array, share: Any, rows: Any, block: Any, mesh: Mesh
) -> Any:
    """Returns the k best after this chunk.

    Takes the best so far [devices, groups, t, k], queries [groups, t, D] and the vectors of `_place`.
    """

    def on_device(best: Any, queries: jax.Array, vectors: Any, start: jax.Array) -> Any:
        k, vectors = best[0].shape[-1], _normalize(vectors[0])
        first = jax.lax.axis_index(AXES) * share + start

        def one_group(group: Any) -> Any:
            (similarity, row), queries = group
            product = jnp.matmul(_normalize(queries), vectors.T, precision=jax.lax.Precision.HIGHEST)
            found, place = _contenders(product, rows - first, k, block)
            return _top(jnp.concatenate([similarity, found], 1), jnp.concatenate([row, first + place], 1), k)

        best = jax.lax.map(one_group, (jax.tree.map(lambda x: x[0], best), queries))
        return jax.tree.map(lambda x: x[None], best)

    specs = ((BATCH, BATCH), REPLICATED, BATCH, REPLICATED)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(BATCH, BATCH), check_vma=False)(
        best, queries, vectors, start
    )


def _contenders(similarity: jax.Array, real: jax.Array, k: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Reduces [t, n] to similarities and positions (ascending) [t, k * block] that include the k best of each row.

    The k best are in the k blocks with the largest maxima (ties go to the lower block). Searching n / block maxima and
    then k * block values is faster than searching n values. Positions from `real` on are padding, see `_place`.
    """
    blocks = similarity.reshape(len(similarity), -1, block)
    maxima = jnp.where(jnp.arange(blocks.shape[1]) * block < real, blocks.max(-1), -jnp.inf)
    chosen = jnp.sort(jax.lax.top_k(maxima, min(k, blocks.shape[1]))[1], axis=1)
    values = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(blocks), -1)
    places = (chosen[:, :, None] * block + jnp.arange(block)).reshape(len(blocks), -1)
    return jnp.where(places < real, values, -jnp.inf), places


def _top(similarity: jax.Array, row: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    similarity, place = jax.lax.top_k(similarity, k)
    return similarity, jnp.take_along_axis(row, place, axis=1)


@partial(jax.jit, static_argnames="mesh")
def _join(best: Any, mesh: Mesh) -> Any:
    """Returns the best of all devices, replicated: [devices, groups, t, k] -> [groups, t, k]."""

    def on_device(best: Any) -> Any:
        # Each device gets all candidates of its share of a group's queries: [t, k] -> [t / devices, devices * k].
        exchange = partial(jax.lax.all_to_all, axis_name=AXES, split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.map(
            lambda group: _top(exchange(group[0]), exchange(group[1]), group[0].shape[-1]),
            jax.tree.map(lambda x: x[0], best),
        )

    spec = jax.P(None, AXES)
    joined = jax.shard_map(on_device, mesh=mesh, in_specs=((BATCH, BATCH),), out_specs=(spec, spec), check_vma=False)(
        best
    )
    # Replicated, so that every process can read them: these are only a few numbers per query.
    return jax.lax.with_sharding_constraint(joined, NamedSharding(mesh, REPLICATED))
