"""Folders saved by the datasets library of Hugging Face (`save_to_disk`): which of their Arrow files are the data.

Such a folder may also contain the library's caches, which are Arrow files too, and files of an earlier save.
"""
from pathlib import Path
from typing import List, Optional

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, read_json_object

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_files(folder: Path, files: List[Path]) -> List[Path]:
    """Those of `files`, the tables below `folder`, that are data: of a saved folder's Arrow files only those listed in
    its state.json.

    Raises ConfigError: `folder` was saved with several splits, or a file is missing.
    """
    folders = sorted({file.parent for file in files if file.suffix == ".arrow"})
    splits = _object(folder / _SPLITS).get("splits") if folders else None
    if isinstance(splits, list) and len(splits) > 1:
        raise ConfigError(f"folder {folder} contains the splits {', '.join(map(str, splits))}; name those to "
                          f"train on, such as {folder / str(splits[0])}")
    names = {path: _names(path) for path in folders}
    for path in folders:
        for name in names[path] or ():
            if not (path / name).exists():
                raise ConfigError(f"folder {path}: the file {name}, which its {_STATE} names, is missing; copy it "
                                  "again, or save the data set again")
        if names[path] and _object(path / _STATE).get("_indices_data_files"):
            raise ConfigError(f"folder {path} was saved with a row index by an old version of datasets; load "
                              "it and save the result of flatten_indices()")
    chosen = []
    for file in files:
        current = names.get(file.parent) if file.suffix == ".arrow" else None
        if current is None or file.name in current:
            chosen.append(file)
    return chosen


def _object(path: Path) -> JsonObject:
    try:
        return read_json_object(path, "file")
    except ConfigError:
        return {}                                # missing, or another program's


def _names(folder: Path) -> Optional[List[str]]:
    """The data files listed in the folder's state.json; None if there is none or it is another program's."""
    files = _object(folder / _STATE).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
        return None
    return [str(file["filename"]) for file in files]
