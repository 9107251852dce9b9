"""Benchmarks: every performance claim of the project is a command in here."""
