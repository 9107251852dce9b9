"""The classic tasks: inputs to model calls to typed results. No grpc, no protobuf."""
