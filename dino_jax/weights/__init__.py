"""Weights from and to PyTorch names."""
