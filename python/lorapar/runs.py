"""A run's folder: files that appear whole or not at all, and what each was made from."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorapar.config import Config, plain
from lorapar.errors import UserError

MANIFEST = "stages.json"


def digest(value: Any) -> str:
    """sha256 of a JSON-able value."""
    text = json.dumps(plain(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, or of all files of a folder with their names."""
    h = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            h.update(str(file.relative_to(path)).encode())
            with file.open("rb") as f:
                while block := f.read(1 << 20):
                    h.update(block)
    return h.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it there at the end, if all went well."""
    _sweep(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an older one at `path` is replaced."""
    _sweep(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(temporary, 0o755)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Makes the folder, and removes what a killed process left of this file or folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Run:
    """The folder of one run and its manifest: per stage its settings, inputs and outputs."""

    def __init__(self, config: Config):
        self.config = config
        self.dir = Path(config.run_dir)

    @property
    def source(self) -> str:
        """What a user gives the command line: this folder, once it holds its configuration."""
        return str(self.dir) if self.path("config.yaml").exists() else "CONFIG.yaml"

    def path(self, name: str) -> Path:
        return self.dir / name

    def need(self, name: str, stage: str) -> Path:
        """The path of a file made by `stage`, or a UserError that says what to run."""
        path = self.path(name)
        if not path.exists():
            raise UserError(f"{path} is missing; run `lorapar {stage} {self.source}` first")
        return path

    def record(self, stage: str) -> dict[str, Any] | None:
        """What the manifest says of a finished stage."""
        return self._manifest().get(stage)

    def finish(
        self, stage: str, settings: dict, inputs: dict[str, str], outputs: list[str]
    ) -> None:
        """Writes config.yaml and the stage's record: its settings, inputs and outputs by hash."""
        manifest = self._manifest()
        manifest[stage] = {
            "settings": json.loads(json.dumps(plain(settings), default=str)),
            "inputs": inputs,
            "outputs": {name: file_digest(self.path(name)) for name in outputs},
        }
        if stage in ("label", "score", "partition", "sft", "rl"):
            write_text(self.path("config.yaml"), self.config.to_yaml())
        write_text(self.path(MANIFEST), json.dumps(manifest, indent=1))

    def stale(self, stage: str, settings: dict, inputs: dict[str, str]) -> str | None:
        """Why a finished stage does not fit these settings and inputs; None if it does."""
        record = self.record(stage)
        if record is None:
            return "it has not been run"
        for name, sha in record["outputs"].items():
            if not self.path(name).exists():
                return f"{name} is missing"
            if file_digest(self.path(name)) != sha:
                return f"{name} has changed since it was written"
        if changed := _difference(
            record["settings"], json.loads(json.dumps(plain(settings), default=str))
        ):
            return changed
        for name, sha in inputs.items():
            if record["inputs"].get(name) != sha:
                return f"it was made from another {name}"
        return None

    def check(self, stage: str, settings: dict, inputs: dict[str, str]) -> None:
        """Raises UserError if a finished stage was made with other settings or inputs."""
        if why := self.stale(stage, settings, inputs):
            output = next(iter((self.record(stage) or {"outputs": {stage: ""}})["outputs"]))
            stage = "score" if stage == "init" else stage  # which makes it
            raise UserError(
                f"{self.path(output)} does not fit this configuration: {why}; rerun `lorapar "
                f"{stage} {self.source}`, or set the configuration back, or use another run_dir"
            )

    def _manifest(self) -> dict[str, Any]:
        path = self.path(MANIFEST)
        if not path.exists():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}; delete it") from None


def _difference(made_with: dict, now: dict, prefix: str = "") -> str | None:
    for key in sorted(set(made_with) | set(now)):
        old, new = made_with.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := _difference(old, new, f"{prefix}{key}."):
                return found
        elif old != new:
            return f"it was made with {prefix}{key} {old!r}, the configuration says {new!r}"
    return None
