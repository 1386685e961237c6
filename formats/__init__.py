"""What bytes mean: one folder or module a format, and the abstractions that they share. Never imports convert/."""

# The root of the repository is the package: run from inside it, `import formats` would load everything twice.
assert __name__ == "diskmorph.formats", "import diskmorph.formats, not formats"  # noqa: S101
