"""A store in a folder that is remote to the project and that several processes see; it notes what is downloaded from it."""

import shutil
from pathlib import Path
from typing import Any

import fsspec


class FolderStore(fsspec.AbstractFileSystem):
    """Files below a local folder at `folder:///path`; each download is a line in DOWNLOADS of the folder's root."""

    protocol = "folder"
    cachable = False

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = Path(self._strip_protocol(path))
        if not found.exists():
            raise FileNotFoundError(path)
        return {
            "name": str(found), "size": found.stat().st_size, "type": "directory" if found.is_dir() else "file",
        }  # fmt: skip

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = Path(self._strip_protocol(path))
        if not found.is_dir():
            raise FileNotFoundError(path)
        entries = [self.info(str(each)) for each in sorted(found.iterdir())]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        local = Path(self._strip_protocol(path))
        if mode != "rb":
            local.parent.mkdir(parents=True, exist_ok=True)
        return local.open(mode)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        local = Path(self._strip_protocol(rpath))
        local.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(lpath, local)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        local = Path(self._strip_protocol(rpath))
        with (local.parent / DOWNLOADS).open("a", encoding="utf-8") as notes:
            notes.write(f"{local.name}\n")
        shutil.copyfile(local, lpath)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        local = Path(self._strip_protocol(path))
        shutil.rmtree(local) if local.is_dir() else local.unlink()

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        Path(self._strip_protocol(path)).mkdir(parents=create_parents, exist_ok=True)


DOWNLOADS = "downloads.txt"

fsspec.register_implementation("folder", FolderStore, clobber=True)


def downloads(folder: Path) -> list[str]:
    """Names of the files that were downloaded from a folder, once per download."""
    notes = folder / DOWNLOADS
    return notes.read_text(encoding="utf-8").split() if notes.exists() else []
