"""Loads trained weights, and converts them to and from PyTorch formats."""
