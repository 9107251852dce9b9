"""Conversations and their history. No torch, no grpc, no protobuf."""
