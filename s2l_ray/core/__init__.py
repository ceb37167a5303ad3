"""Pure code, a folder a subject. Nothing here imports Ray."""
