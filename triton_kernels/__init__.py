"""Triton kernels of longtail."""
