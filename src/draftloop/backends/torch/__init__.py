"""The PyTorch backend: a lean decoder on CPU and CUDA, with native 4-bit weights."""
