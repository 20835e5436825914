"""The compressed cache inside vLLM's own paged memory: codes of all layers in its pages, the most recent tokens exact."""
