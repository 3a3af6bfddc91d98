"""Repositories of the test Hub: files, their ids in git and LFS, and commits."""

import hashlib
from dataclasses import dataclass, field


def blob_id(content: bytes) -> str:
    """Git's id of a file: sha1 of its content behind a header."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; ``lfs`` says how it was uploaded."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """Git's content for an LFS file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        return blob_id(self.pointer if self.lfs else self.content)

    def describe(self, path: str) -> dict:
        """The file's entry in the response of the tree endpoint."""
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass
class Repository:
    """Commits of a repository by sha, the newest last; "main" is the newest."""

    private: bool
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, StoredFile]:
        """The files of "main" by path."""
        return self.commits[self.head]

    def add(self, files: dict[str, StoredFile], message: str) -> str:
        names = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {message}\n{names}".encode()).hexdigest()
        self.commits[sha] = files
        return sha
