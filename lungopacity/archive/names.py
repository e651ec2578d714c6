"""What names of films, as people write them, may mean in an archive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property


class Endings(frozenset[str]):
    """Names. A file is among them, too, where its name ends with one of them, folder by folder: the
    table of a public set says `1.png`, and the film lies at `images/1.png`. Or one of them ends
    with the file's name, if that has a folder: the table says `set/train/p1/1.png`, and the archive
    was unpacked into `set/`."""

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and bool(self.meant(file))

    def meant(self, file: str) -> set[str]:
        """The names that may mean the file."""
        shorter = {ending for ending in _endings(file) if frozenset.__contains__(self, ending)}
        return shorter | set(self._longer.get(file, ()))

    @cached_property
    def _longer(self) -> dict[str, list[str]]:
        longer: defaultdict[str, list[str]] = defaultdict(list)
        for name in self:
            for ending in _endings(name):
                if "/" in ending:
                    longer[ending].append(name)
        return dict(longer)


def _endings(name: str) -> Iterator[str]:
    yield name
    for place, letter in enumerate(name):
        if letter == "/":
            yield name[place + 1 :]


def files_of(names: Iterable[str], files: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """File by name, of `files` that have none of the names whole; and what there is to say of
    each name that may mean several files, and file that several names may mean: these go with none.
    """
    files_by_name: defaultdict[str, list[str]] = defaultdict(list)
    names_by_file: defaultdict[str, list[str]] = defaultdict(list)
    meaning = Endings(names)
    for file in sorted(set(files)):
        for name in sorted(meaning.meant(file)):
            files_by_name[name].append(file)
            names_by_file[file].append(name)
    doubts = [
        f"{one} may be {several[0]} or {several[1]}"
        for found in (files_by_name, names_by_file)
        for one, several in sorted(found.items())
        if len(several) > 1
    ]
    clear = {
        name: several[0]
        for name, several in files_by_name.items()
        if len(several) == len(names_by_file[several[0]]) == 1
    }
    return clear, doubts
