"""Fused experts and checkpoints: what files call the matrices, and their way in and out."""
