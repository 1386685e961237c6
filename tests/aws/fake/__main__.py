"""Run the fake by itself: prints the endpoint's URL, serves until interrupted."""

import argparse
import threading

from . import Fake, Rule, Serving

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--seed", type=int, default=1, help="of the faults' dice")
parser.add_argument("--fault", action="append", default=[], metavar="KIND:SERVICE:ACTION[:CHANCE]")
parser.add_argument("--encrypt-by-default", action="store_true")
words = parser.parse_args()
fake = Fake(words.seed)
fake.faults.rules += [Rule.parse(text) for text in words.fault]
fake.account.encrypts_by_default = words.encrypt_by_default
print(Serving(fake, words.port).url, flush=True)
threading.Event().wait()
