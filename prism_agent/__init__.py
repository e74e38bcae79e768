"""The agent: makes, limits, watches and ends the sandboxes of one node."""
