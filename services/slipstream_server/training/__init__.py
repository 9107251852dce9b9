"""Training: instruction data, recipes, the runner process and the files through which it reports."""
