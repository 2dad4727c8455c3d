"""Names of files where several are written."""

from collections import Counter
from pathlib import Path


def numbered(wanted: list[Path]) -> list[Path]:
    """The names, with -001, -002 and so on added where several are the same; with more digits where there are more."""
    counts, numbers = Counter(wanted), Counter[Path]()
    digits = max(3, len(str(max(counts.values()))))
    paths = []
    for path in wanted:
        numbers[path] += 1
        paths.append(path.with_stem(f"{path.stem}-{numbers[path]:0{digits}}") if counts[path] > 1 else path)
    return paths
