"""What is recorded beside results: versions of the libraries, settings as plain JSON."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a state means."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("dino_jax", "jax", "flax", "optax", "orbax-checkpoint")
    }


def plain(config: Any) -> dict[str, Any]:
    """A ConfigDict or dict as JSON would give it back: dicts, lists, numbers, strings."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: {"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (run from its source folder)"
