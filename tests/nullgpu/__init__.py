"""Checks of the CUDA path without a GPU, on one that does nothing: see ``nullgpu.c`` and CONTRIBUTING.md."""
