"""Draft heads: one transformer layer that predicts from a target's hidden states, and the folders that keep them."""
