"""Conversion of foreign checkpoints to MLX model folders."""
