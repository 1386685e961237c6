"""A fake of AWS for tests of exports to AMIs: strict where moto is not. docs/aws-testing.md says how to use it."""

from .account import BLOCK, Account, Snapshot
from .faults import Faults, Rule
from .server import Fake, Serving

__all__ = ["BLOCK", "Account", "Fake", "Faults", "Rule", "Serving", "Snapshot"]
