"""What the benchmarks measure against, each in a virtual environment of its own below ``.peers``."""
