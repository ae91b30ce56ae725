"""Speculative decoding that learns from your own traffic: exact, local, and faster the more you use it."""
