"""Traces → batches → trainer → gate → promote. Knows the backends' seam and the store, no framework."""
