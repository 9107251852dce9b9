"""AdapterService over gRPC."""
