"""The replicated state: what every member knows, and the only way in which it changes."""
