"""MLX: Metal on Apple silicon, CUDA and the processor on Linux. The only folder that imports it."""
