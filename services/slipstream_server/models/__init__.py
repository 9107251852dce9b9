"""Models: where they come from, what they are, what they cost, and how they are loaded.

Everything but ``loading`` and ``prepare`` is free of torch and transformers, because the inference front imports it.
"""
