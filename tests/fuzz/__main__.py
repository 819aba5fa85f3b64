"""Many cases, by hand: `python -m tests.fuzz --cases 20000 --seed 0`. Exits with 1 where one fails."""

import argparse
import collections
import random
import re
import sys

import torch

from tests.fuzz.checks import report, tried
from tests.fuzz.models import some


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shown", type=int, default=10, help="how many of the failures are shown as scripts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds, words = collections.Counter(), collections.Counter()
    try:
        for case in some(options.cases, random.Random(options.seed).choice):
            verdict = tried(case)
            kinds[verdict.kind] += 1
            words[f"{verdict.kind}: {_kind_of(verdict.words)}"] += bool(verdict.words)
            if verdict.kind == "failed" and kinds["failed"] <= options.shown:
                sys.stdout.write(f"\n# {'-' * 100}\n{report(case)}\n")
                sys.stdout.flush()
    except KeyboardInterrupt:  # what has been found so far
        pass
    lines = [f"{count:6d}  {text}" for text, count in words.most_common() if count]
    sys.stdout.write("\n".join(["", f"{sum(kinds.values())} cases: {dict(kinds)}", *lines, ""]))
    return bool(kinds["failed"])


def _kind_of(words: str) -> str:
    """A message less its names and numbers."""
    line = words.strip().splitlines()[-1] if words.startswith("another error") else words
    return re.sub(r"'[^']*'|\d[\d.e+-]*", "_", line)[:90]


if __name__ == "__main__":
    sys.exit(main())
