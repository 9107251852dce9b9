"""The inference service: a front without torch, and one worker process for each loaded model."""
