"""The choice of tokens: parameters, biases and penalties, noise, and the log-probabilities of what was chosen."""
