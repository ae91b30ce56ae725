"""A decoder's steps in C, for x86 processors with AVX-512 VNNI; elsewhere PyTorch's own do the work."""
