"""The sides, one program each: warm, and silent until the bench tells them to run."""
