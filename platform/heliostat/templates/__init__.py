"""The project that `heliostat init` makes: files to be copied, then changed into the user's own."""

import shutil
from pathlib import Path

from heliostat.errors import SpecError

PROJECT = Path(__file__).parent / "project"


def create_project(folder: Path) -> list[Path]:
    """Copy the project into `folder`. Raises SpecError rather than overwrite a file; returns what was written."""
    sources = sorted(path for path in PROJECT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    targets = [folder / source.relative_to(PROJECT) for source in sources]
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder}: is a file, not a folder")
    for target in targets:
        if target.exists():
            raise SpecError(f"{target}: is there already; name a new folder")
    for source, target in zip(sources, targets):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return targets
