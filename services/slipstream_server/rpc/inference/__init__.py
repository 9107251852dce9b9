"""InferenceService and ModelService over gRPC."""
