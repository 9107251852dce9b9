"""Embeddings and classification by many callers at once, against pipelines and a batching server."""
