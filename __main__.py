"""`python -m diskmorph`."""

from diskmorph.cli import entry

entry()
