"""The paper's evaluation as one command: settings from a YAML file, a bundle and records for each."""
