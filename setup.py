"""The packages of the wheel: those in dino_jax/, and configs/ as dino_jax.configs. The rest is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["dino_jax", "dino_jax.*"]), "dino_jax.configs"],
    package_dir={"dino_jax.configs": "configs"},
    package_data={"dino_jax": ["py.typed"], "dino_jax.data.demo": ["*"]},
)
