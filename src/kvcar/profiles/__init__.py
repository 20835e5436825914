"""Plans found rather than given: statistics of a model, blocks and bits by effect on its output, tuned decoders."""
