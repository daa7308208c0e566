"""Exact k nearest neighbors on the CPU: ours beside scikit-learn's and faiss's brute force on the same work.

    python -m benchmarks.knn [--bank=1281167] [--queries=50000] [--dim=384] [--k=200] [--threads=0]

Random unit vectors of 1,000 classes, float32, as many as ImageNet has images. Each library searches in a process of its
own, so that its peak of memory is its own; the vectors are made and given to it before the clock starts. Ours runs with
one virtual device a core, and the line with votes adds k-NN classification (k = 10, 20, 100, 200). scikit-learn
(`NearestNeighbors`, brute) and faiss (`IndexFlatIP`) are left out where they are not installed: pip install
scikit-learn faiss-cpu. The similarities found are compared place by place: where they agree to float32's rounding the
neighbors are the same up to ties.
"""

import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging

BANK = flags.DEFINE_integer("bank", 1_281_167, "rows of the bank")
QUERIES = flags.DEFINE_integer("queries", 50_000, "queries")
DIM = flags.DEFINE_integer("dim", 384, "numbers of a row")
K = flags.DEFINE_integer("k", 200, "neighbors")
THREADS = flags.DEFINE_integer("threads", 0, "cores to use; 0: all")
ONLY = flags.DEFINE_string("only", "", "search with this one, here, and write what was found to --found")
FOUND = flags.DEFINE_string("found", "", "file for --only")

CLASSES, VOTES = 1_000, (10, 20, 100, 200)
ROUNDING = 2e-6  # of a similarity, twice what 384 products in float32 were seen to differ by in another order


def unit_rows(seed: int, rows: int) -> np.ndarray:
    """float32 [rows, dim], of length 1."""
    x = np.random.default_rng(seed).standard_normal((rows, DIM.value), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ours(bank, queries, k):
    """Our search, then the votes."""
    import jax

    from dino_jax.evals import knn
    from dino_jax.evals.common import neighbors

    if THREADS.value != 1:
        jax.config.update("jax_num_cpu_devices", THREADS.value or os.cpu_count())
    neighbors.nearest(bank[: 2 * k], queries[:2], k)  # starts the devices; programs are compiled on the clock
    yield
    yield neighbors.nearest(bank, queries, k)[0]
    labels = np.random.default_rng(2).integers(0, CLASSES, len(bank))
    yield
    yield knn.knn_predict(bank, labels, queries, VOTES, num_classes=CLASSES)


def faiss(bank, queries, k):
    """IndexFlatIP."""
    import faiss

    if THREADS.value:
        faiss.omp_set_num_threads(THREADS.value)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank)
    yield
    yield index.search(queries, k)[0]


def sklearn(bank, queries, k):
    """NearestNeighbors, brute; |a - b|^2 = 2 - 2 ab of unit vectors."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=THREADS.value or None).fit(bank)
    yield
    distance, _ = index.kneighbors(queries)
    yield 1 - distance**2 / 2


SEARCHES = {"ours": ours, "faiss": faiss, "sklearn": sklearn}


def search(name: str) -> None:
    """Runs one search and writes what it found: similarities, seconds, processor seconds, peak memory."""
    bank, queries = unit_rows(0, BANK.value), unit_rows(1, QUERIES.value)
    steps = SEARCHES[name](bank, queries, K.value)
    results = []
    for _ in steps:  # up to where it is ready
        wall, cpu = time.perf_counter(), time.process_time()
        found = next(steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        results.append((time.perf_counter() - wall, time.process_time() - cpu, peak))
        if len(results) == 1:
            np.save(FOUND.value, np.asarray(found, np.float32))
    np.savetxt(FOUND.value + ".txt", results)


def main(argv: list[str]) -> None:
    """Prints the table."""
    logging.set_verbosity(logging.WARNING)  # jax and faiss tell what they could not load
    if ONLY.value:
        return search(ONLY.value)
    from benchmarks import environment

    print(
        f"{environment.describe()}; {QUERIES.value:,} queries, bank {BANK.value:,} x {DIM.value}, k = {K.value}, "
        f"{THREADS.value or os.cpu_count()} threads\n"
    )
    print("| search | seconds | processor seconds | peak GiB of the process | as ours |\n|---|---|---|---|---|")
    threads = str(THREADS.value or os.cpu_count())
    settings = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    if THREADS.value == 1:
        settings["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    sizes = [f"--{x.name}={x.value}" for x in (BANK, QUERIES, DIM, K, THREADS)]
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for name in SEARCHES:
            if name != "ours" and importlib.util.find_spec(name) is None:
                print(f"| {name} | not installed | | | |")
                continue
            file = Path(folder) / f"{name}.npy"
            command = [sys.executable, "-m", "benchmarks.knn", f"--only={name}", f"--found={file}", *sizes]
            subprocess.run(command, check=True, env=settings)
            found, lines = np.load(file), np.loadtxt(f"{file}.txt", ndmin=2)
            first = found if first is None else first
            off = float(np.abs(found - first).max())
            same = "yes" if off <= ROUNDING else f"no: similarities differ by up to {off:.1e}"
            for title, (wall, cpu, peak) in zip((name, f"{name}, with votes"), lines, strict=False):
                print(f"| {title} | {wall:.1f} | {cpu:.1f} | {peak:.1f} | {same} |", flush=True)
    return None


if __name__ == "__main__":
    app.run(main)
