"""Pictures, sounds, films and documents: decoding, and the runners of their tasks. Lives in workers."""
