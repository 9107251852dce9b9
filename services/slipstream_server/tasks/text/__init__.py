"""Tasks on text that do not write text: what they make of texts, what the model does, and what comes of its output.
The worker's own room, with torch.
"""
