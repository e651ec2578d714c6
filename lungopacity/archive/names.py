"""Matches names of films, as people write them in tables, with the files of an archive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Wanted:
    """Which files of an archive are wanted."""

    names: frozenset[str]
    """Keys, or names of members of shards."""
    by_ending: bool = False
    """Also want a file whose name ends with one of `names`, by whole folders: the table of a public
    data set says `1.png`, and the film is at `images/1.png`. And want a file in a folder if one of
    `names` ends with the file's name: the table says `set/train/p1/1.png`, and the archive was
    unpacked into `set/`. `./1.png`, as `find` writes it, means `1.png` at the top."""

    def has(self, file: str) -> bool:
        """Whether the file with this name is wanted."""
        return file in self.names or (self.by_ending and bool(self.meant(file)))

    def may_lie_in(self, container: str) -> bool:
        """Whether a wanted file may be inside the container with this name."""
        # An ending does not say which container the file is in.
        return self.by_ending or container in self._folders

    def meant(self, file: str) -> set[str]:
        """Those of `names` that may mean the file, by their endings."""
        shorter = {ending for ending in _endings(file) if ending in self.names}
        return shorter | set(self._longer.get(file, ()))

    @cached_property
    def _folders(self) -> frozenset[str]:
        return frozenset(
            name[:place]
            for name in self.names
            for place, letter in enumerate(name)
            if letter == "/"
        )

    @cached_property
    def _longer(self) -> dict[str, list[str]]:
        longer: defaultdict[str, list[str]] = defaultdict(list)
        for name in self.names:
            for ending in _endings(name):
                if "/" in ending or name == f"./{ending}":
                    longer[ending].append(name)
        return dict(longer)


def _endings(name: str) -> Iterator[str]:
    yield name
    for place, letter in enumerate(name):
        if letter == "/":
            yield name[place + 1 :]


def names_by_ending(files: Iterable[str], names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Match files with `names` by ending, see `Wanted.by_ending`.

    files: without repeats, and without those that match one of `names` as a whole. Returns the name
    of each file that has one, and a sentence for each name that may mean several files and for each
    file that several names may mean: these are not matched.
    """
    files_by_name: defaultdict[str, list[str]] = defaultdict(list)
    names_by_file: defaultdict[str, list[str]] = defaultdict(list)
    wanted = Wanted(frozenset(names), by_ending=True)
    for file in files if wanted.names else ():
        for name in sorted(wanted.meant(file)):
            files_by_name[name].append(file)
            names_by_file[file].append(name)
    doubts = [
        f"{one} may be {several[0]} or {several[1]}"
        for found in (files_by_name, names_by_file)
        for one, several in sorted(found.items())
        if len(several) > 1
    ]
    clear = {
        several[0]: name
        for name, several in files_by_name.items()
        if len(several) == len(names_by_file[several[0]]) == 1
    }
    return clear, doubts
