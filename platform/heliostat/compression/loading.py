"""Loading a model that may come from somebody else: nothing of it runs unless its user says so.

A torch artifact is code, whatever its files are called: `model.json` names a function of any installed module, which is
called with the arguments beside it, and modules in `code/` are imported. So is a `.pt2`, whose weights torch unpickles.
A graph in one of the other formats is read as data. Digests tell a damaged file, and a changed one as long as the
record that has them was not changed too: they say nothing about who wrote it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat.compression import formats
from heliostat.core.artifact import RECORD
from heliostat.core.artifact import read_record as read_node_record
from heliostat.core.carrier import Files
from heliostat.core.integrity import verify
from heliostat.errors import ArtifactError


def load_model(path: Path | str, *, trust_code: bool = False) -> formats.Model:
    """The model in the folder `path`, which may be the folder of a finished node: a callable from a batch to outputs.

    Args:
        trust_code: run the code of a torch model or a `.pt2`. Only for artifacts whose origin you trust.

    Raises:
        ArtifactError: there is no model, a file of it is missing, damaged or changed, or it is code and not trusted.
    """
    folder = Path(path)
    described = formats.read_record(folder)
    why = formats.FORMATS[described["format"]].why_code
    if why and not trust_code:
        raise ArtifactError(
            f"{folder} holds a {described['format']} model, and loading one {why}, which can run anything as you. "
            f"If you trust where it comes from: heliostat.load_model({str(path)!r}, trust_code=True). "
            "A model in the format onnx, tflite or pte needs no trust"
        )
    files = _recorded(folder, described)
    if files is not None:
        formats.check_code(folder, files)
        verify(folder, files)
    return formats.load_model(folder)


def _recorded(folder: Path, described: Mapping[str, Any]) -> Files | None:
    """The digests of the model's files: those of the node's record, or else of `model.json`; None in old artifacts."""
    needed = ["model.json", *formats.FORMATS[described["format"]].deployed]
    record = read_node_record(folder)
    if record is None:
        stated: Files | None = described.get("files")
        return stated
    if unknown := [name for name in needed if name not in record.files]:
        raise ArtifactError(f"{folder / unknown[0]} is not among the files that {RECORD} tells of")
    return {name: entry for name, entry in record.files.items() if name in needed or name.startswith("code/")}
