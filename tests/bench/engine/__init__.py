"""The engine against its peers: the same requests, the same cores, in turns."""
