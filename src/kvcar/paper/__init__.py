"""KV-CAR (arXiv 2512.06727) as published: Algorithm 1, Algorithm 2, int8 on the latents, its evaluation; and what works better."""
