"""Compares the figures of documentation pages with those at another commit.

    python tests/docs/same_figures.py COMMIT [PAGE ...]

Every number of a page counts, with its decimals, however the sentence around it reads. Prints the
numbers that one page has and the other has not, and ends with 1 if a number of the old page is
gone.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def numbers(text: str) -> Counter[str]:
    """Counts the numbers of a text."""
    return Counter(_NUMBER.findall(text))


def main(commit: str, *pages: str) -> int:
    """Compares pages; returns the exit status."""
    status = 0
    for page in pages or map(str, sorted(Path("docs").glob("*.md"))):
        old = subprocess.run(["git", "show", f"{commit}:{page}"], capture_output=True, text=True)
        if old.returncode:
            print(f"{page}: not there at {commit}")
            continue
        before, after = numbers(old.stdout), numbers(Path(page).read_text())
        gone, new = before - after, after - before
        print(f"{page}: {before.total()} numbers, {gone.total()} gone, {new.total()} new")
        for title, found in (("gone", gone), ("new", new)):
            if found:
                print(f"  {title}: {', '.join(sorted(found.elements()))}")
        status |= bool(gone)
    return status


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
