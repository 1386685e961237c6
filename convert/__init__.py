"""What happens between formats."""

assert __name__ == "diskmorph.convert", "import diskmorph.convert, not convert"  # noqa: S101
