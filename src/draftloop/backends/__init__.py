"""Frameworks behind one seam (`base.py`): the numpy reference, PyTorch, MLX."""
