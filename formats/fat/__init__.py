"""See reader and writer."""
