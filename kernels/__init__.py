"""Triton kernels, one module per family. There is none yet: the engines so far run on CPU."""
