"""Models: where they come from, what they are, what they cost, and how they are loaded.

The inference front imports these rooms, so that they are free of torch and transformers, but for ``loading`` and
``quantization``, which live in workers and in training, and the programs that run as processes of their own:
``prepare`` (with ``sentiment``), ``make``, ``export``, ``fit`` and ``examine``.
"""
