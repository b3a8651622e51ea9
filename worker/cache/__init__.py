"""Per-row KV caches that plug into the model classes of mlx-lm."""
