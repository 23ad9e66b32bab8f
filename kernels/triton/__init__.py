"""Triton kernels and their launchers, one module per op; they import torch and triton only."""
