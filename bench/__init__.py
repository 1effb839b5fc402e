"""What you run to know how fast: every time is a ratio against a rival in the same run."""
