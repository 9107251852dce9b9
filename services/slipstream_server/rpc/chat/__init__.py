"""ChatService over gRPC."""
