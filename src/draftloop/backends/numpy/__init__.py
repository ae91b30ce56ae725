"""The reference backend: NumPy only, slow, plain. Every other backend is tested against it."""
