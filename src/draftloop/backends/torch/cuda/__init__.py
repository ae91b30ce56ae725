"""Decoding steps on an NVIDIA GPU: fused kernels, replayed as CUDA graphs."""
