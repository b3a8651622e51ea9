"""Making a draft head for a model: text of its own, training on it, measurement. Runs in a process of its own."""
