"""The one place that names the version; importlib.metadata costs 50 ms to ask."""

__version__ = "0.1.0"
