"""The record of a run: what was asked, what was made of what, and whether it can be reused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsa_lightning.checkpoint import file_hash, folder_hashes, key_of, write_json

NAME = "manifest.json"
FORMAT = 1
PRODUCTS = ("model", "adapter", "pairs.jsonl", "validation.jsonl", "mixture.json")  # what steps leave, in their folder


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
        if changed := _changed(before, now):
            return f"runs again, changed: {', '.join(changed)}"
        for what in PRODUCTS:
            if _hashes(model.with_name(what)) != finished.get(what, {}):
                return f"runs again, the files of its {what} are not those it wrote"
        return None

    def finish(self, name: str, inputs: Mapping[str, Any], model: Path, **facts: Any) -> None:
        """Records a finished step, with what stands beside its model, or in its place: from here on it is reused."""
        plain = json.loads(json.dumps(inputs, default=str))
        found = {what: _hashes(model.with_name(what)) for what in PRODUCTS}
        hashes = {what: found[what] for what in PRODUCTS if found[what] or what in PRODUCTS[:2]}
        self.put("steps", name, {"key": key_of(plain), **facts, **hashes, "inputs": plain})

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


def recorded(folder: Path) -> Manifest:
    """The record of a run, to be read and no more. Raises ValueError where there is none, or none that can be read."""
    path = folder / NAME
    if not path.is_file():
        inside = _is_run(folder.resolve().parent)
        mend = f": it lies in one, --run {folder.parent}" if inside else f" (no {NAME} in it): give the output of one"
        raise ValueError(f"--run {folder} is no run of rsa align{mend}")
    try:
        return Manifest(folder)
    except ValueError as error:
        known = ", ".join(sorted(found.parent.name for found in folder.glob("*/model")))
        raise ValueError(
            f"--run {folder}: its {NAME} cannot be read, so nothing says what its models are: restore it from a copy. "
            f"The models themselves stand in the folders model of: {known or 'none'}"
        ) from error


def run_around(place: Path) -> Path | None:
    """The run directory that a path is, or lies in however deep; None where there is none."""
    return next((folder for folder in (place.resolve(), *place.resolve().parents) if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    try:
        entries = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(entries, dict) and "format" in entries  # others have a file of this name, too


def _hashes(product: Path) -> dict[str, str]:
    """File name -> hash, of a folder or of one file; empty where there is nothing."""
    return {product.name: file_hash(product)} if product.is_file() else folder_hashes(product)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, those of a class of settings by their own names: `step.loss`, `adapter.rank`."""
    found = []
    for key in (*now, *(key for key in before if key not in now)):
        then, value = before.get(key), now.get(key)
        if then == value:
            continue
        if key in ("step", "adapter", "trainer") and isinstance(then, Mapping) and isinstance(value, Mapping):
            found += [f"{key}.{part}" for part in _changed(then, value)]
        else:
            found.append(key)
    return found
