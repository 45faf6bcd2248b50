"""The record of a run: what was asked, what was made of what, and whether it can be reused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsa_lightning.checkpoint import folder_hashes, key_of, write_json

NAME = "manifest.json"
FORMAT = 1


class Manifest:
    """RUN/manifest.json, read once and replaced whole at every change.

    Raises:
        ValueError: the folder holds something that is no run, or a manifest that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = self._read()

    def note(self, **entries: Any) -> None:
        """Sets entries; the file on disk is always whole."""
        self.entries = {"format": FORMAT, **self.entries, **entries}
        write_json(self.folder / NAME, self.entries)

    def section(self, name: str) -> dict[str, Any]:
        return dict(self.entries.get(name, {}))

    def put(self, section: str, name: str, entry: Any) -> None:
        """Sets one entry of a section; None removes it."""
        kept = {key: value for key, value in self.section(section).items() if key != name}
        self.note(**{section: kept if entry is None else {**kept, name: entry}})

    def forget(self, name: str) -> None:
        """Drops what is known of a step before it runs again, and the results that its old model is part of."""
        self.put("steps", name, None)
        self.put("evaluations", name, None)
        for stale in [*self.folder.glob("*.png"), self.folder / "results.json", self.folder / "report.md"]:
            stale.unlink(missing_ok=True)

    def why_again(self, name: str, inputs: Mapping[str, Any], model: Path) -> str | None:
        """Why a step must run, in words; None when its model can be reused."""
        finished = self.section("steps").get(name)
        if finished is None:
            return "runs"
        before, now = finished["inputs"], json.loads(json.dumps(inputs, default=str))
        changed = [key for key in now if before.get(key) != now[key]]
        if "step" in changed:
            settings = [key for key in now["step"] if before["step"].get(key) != now["step"][key]]
            changed = [f"step.{key}" for key in settings] + [key for key in changed if key != "step"]
        if changed:
            return f"runs again, changed: {', '.join(changed)}"
        if folder_hashes(model) != finished["model"]:
            return "runs again, the files of its model are not those it wrote"
        return None

    def finish(self, name: str, inputs: Mapping[str, Any], model: Path, **facts: Any) -> None:
        """Records a finished step: from here on it is reused."""
        plain = json.loads(json.dumps(inputs, default=str))
        self.put("steps", name, {"key": key_of(plain), **facts, "model": folder_hashes(model), "inputs": plain})

    def _read(self) -> dict[str, Any]:
        path = self.folder / NAME
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ValueError(
                    f"output {self.folder} exists and is no run directory (no {NAME} in it): choose another --output"
                )
            return {}
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --output, or remove this run") from error
        if entries.get("format") != FORMAT:
            found = entries.get("format")
            raise ValueError(f"{path} has format {found}, this version writes {FORMAT}: choose another with --output")
        return entries
