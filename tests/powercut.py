"""A disk that loses power: an SQLite VFS that knows what would be left of each file.

Every write goes through to the real file, so the program under test goes on undisturbed; beside that, each file has
an image of what is surely on the disk, brought up to date by `xSync` alone. `left` writes down what a cut at this
moment leaves: the images, and of the writes that no sync has followed any part, in any order, torn at sectors.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

SECTOR = 512


class _Image:
    """One file: what is surely on the disk, and what has been written since."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.there = False
        self.deleted = False
        self.safe = bytearray()
        self.since: list[tuple[int, bytes] | int] = []

    def sync(self) -> None:
        for change in self.since:
            self._apply(self.safe, change)
        self.since.clear()
        self.there = True

    def cut(self, dice: random.Random) -> bytes:
        content = bytearray(self.safe)
        for change in self.since:
            if isinstance(change, int):
                if dice.random() < 0.5:
                    self._apply(content, change)
                continue
            offset, data = change
            fate = dice.random()
            if fate < 0.4:
                self._apply(content, change)
            elif fate < 0.7:
                for at in range(0, len(data), SECTOR):
                    if dice.random() < 0.5:
                        self._apply(content, (offset + at, data[at : at + SECTOR]))
        return bytes(content)

    @staticmethod
    def _apply(content: bytearray, change: tuple[int, bytes] | int) -> None:
        if isinstance(change, int):
            del content[change:]
            return
        offset, data = change
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data


class Disk(apsw.VFS):
    """The default VFS while the context lasts; `moment` is called before each write and sync."""

    def __init__(self, seed: int) -> None:
        self.images: dict[str, _Image] = {}
        self.syncs = 0
        self.moment: Callable[[], None] = lambda: None
        self._dice = random.Random(seed)
        super().__init__(f"power cut {id(self)}", "unix")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> "_File":  # noqa: N802  apsw's
        file = name.filename() if isinstance(name, apsw.URIFilename) else name
        return _File(self, file, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        self.moment()
        super().xDelete(filename, syncdir)
        if filename in self.images:
            self.images[filename].deleted = True
        if syncdir:
            self.sync_folder()

    def sync_folder(self) -> None:
        """Make deletions last, as SQLite does when it syncs a journal or a WAL for the first time."""
        self.images = {name: image for name, image in self.images.items() if not image.deleted}

    def left(self, folder: Path) -> None:
        """Write what a power cut at this moment leaves into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for image in self.images.values():
            if (image.there and not image.deleted) or self._dice.random() < 0.5:
                (folder / Path(image.name).name).write_bytes(image.cut(self._dice))


class _File(apsw.VFSFile):
    def __init__(
        self, disk: Disk, file: str | None, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> None:
        self._disk = disk
        kind = flags[0] & (apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL)
        fresh = _Image(file or "")
        if file is not None and kind and Path(file).exists():  # what was there before is on the disk
            fresh.safe += Path(file).read_bytes()
            fresh.there = True
        if file is not None and kind:
            fresh = disk.images.setdefault(file, fresh)
            if fresh.deleted:
                fresh.deleted = False
                fresh.since.append(0)
        self._image = fresh
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._disk.moment()
        super().xWrite(data, offset)
        self._image.since.append((offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self._disk.moment()
        super().xTruncate(newsize)
        self._image.since.append(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._disk.moment()
        super().xSync(flags)
        self._disk.syncs += 1
        if not self._image.there:
            self._disk.sync_folder()
        self._image.sync()


@contextmanager
def disk(seed: int) -> Iterator[Disk]:
    """Have every SQLite connection opened meanwhile write to a disk that can lose power."""
    made = Disk(seed)
    default = apsw.vfs_names()[0]
    apsw.set_default_vfs(f"power cut {id(made)}")
    try:
        yield made
    finally:
        apsw.set_default_vfs(default)
        made.unregister()
