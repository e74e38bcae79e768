"""What both planes and the CLI share."""

__version__ = "0.1.0"
