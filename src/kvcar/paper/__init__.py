"""Training codecs inside the model they serve: the paper's Algorithm 1, and what works better."""
