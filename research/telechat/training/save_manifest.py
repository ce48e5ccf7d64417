"""The manifests of the checkpoints that a training saves: hashes computed by a thread while training continues.

What a manifest says, see checkpoint/manifest.py. A checkpoint counts as soon as it is on disk; until its manifest
follows, a moment later, it is one without. No MindSpore here.
"""
import contextlib
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional

from research.telechat.checkpoint.integrity import file_entry
from research.telechat.checkpoint.manifest import Manifest, ModelFacts, manifest_path, with_files, write_manifest
from research.telechat.common.files import JsonObject, set_usual_permissions


class ManifestWriter:
    """Writes the manifests of one process's files.

    Args:
        content: {"model": fields of ModelFacts or None, "training": what its steps are counted by}; None: hashes alone.
        log: where a manifest that could not be written is named; the training does not end for it.
    """

    def __init__(self, content: Optional[JsonObject], log: logging.Logger) -> None:
        content = json.loads(json.dumps(content or {}))      # plain dicts, whatever MindFormers has made of them
        model = content.get("model")
        self._model = ModelFacts(**model) if model else None
        self._training: Optional[JsonObject] = content.get("training")
        self._log = log
        self._pool = ThreadPoolExecutor(1, "manifest")
        self._running: List[Future[None]] = []

    def add(self, path: Path, kind: str) -> None:
        """A file is complete: give it the usual permissions, and, soon, a manifest. kind: as in Manifest."""
        with contextlib.suppress(OSError):
            set_usual_permissions(path)
        self._running = [one for one in self._running if not one.done()]
        self._running.append(self._pool.submit(self._write, path, kind))

    def add_strategy(self, folder: Path, rank: int) -> None:
        """The strategy files of this rank in `folder`, where they are newer than their manifests."""
        for path in folder.glob(f"*rank_{rank}.ckpt") if folder.is_dir() else ():
            beside = manifest_path(path, False)
            if not beside.is_file() or beside.stat().st_mtime_ns < path.stat().st_mtime_ns:
                self.add(path, "strategy")

    def wait(self) -> None:
        """Return when all manifests are written."""
        for one in self._running:
            one.result()

    def _write(self, path: Path, kind: str) -> None:
        try:
            manifest = Manifest(kind, model=None if kind == "strategy" else self._model,
                                training=self._training if kind == "training" else None)
            write_manifest(manifest_path(path, False), with_files(manifest, {path.name: file_entry(path)}))
            if not path.exists():
                manifest_path(path, False).unlink(missing_ok=True)
        except FileNotFoundError:
            pass                                         # deleted meanwhile, as newer ones are there
        except OSError as err:
            self._log.warning("%s has no manifest, as it could not be written: %s.", path, err)


def remove_with_manifest(path: Path) -> None:
    """Delete a checkpoint and its manifest. Raises OSError."""
    path.chmod(0o600)
    path.unlink()
    manifest_path(path, False).unlink(missing_ok=True)
