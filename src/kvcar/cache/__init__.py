"""Running a model over a compressed cache: attach, cache, named attention."""
