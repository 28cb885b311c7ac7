"""Denoising in fairchem-core 2.x: all that knows that host."""
