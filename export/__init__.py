"""What you run to build what is served: `python -m export --help`."""
