"""The training service over gRPC: jobs and datasets."""
