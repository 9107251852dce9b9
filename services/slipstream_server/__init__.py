"""Slipstream's services: train, adapt and serve Transformers models over gRPC."""
