"""What one would build instead of this server: the same tasks behind FastAPI, written as a careful user would."""
