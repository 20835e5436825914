"""Loading models, and reading from them what a cache's shape and identity depend on."""
