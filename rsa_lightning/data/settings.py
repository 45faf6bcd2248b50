"""What a preparation depends on: its settings, and the hashes that name its outcome."""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rsa_lightning.checkpoint import file_hash, folder_hashes, key_of
from rsa_lightning.data.quality import Defects
from rsa_lightning.data.readers import Source, fingerprint, is_remote
from rsa_lightning.data.relabel import Relabel
from rsa_lightning.data.template import template_text
from rsa_lightning.data.tokenize import Lengths


@dataclass(frozen=True)
class PrepareSettings:
    """What decides which examples a data set becomes. The attributes are arguments of `PreferenceData`."""

    paths: tuple[str, ...]
    lengths: Lengths
    format: str = "trl"
    criterion: str | None = None
    template: str | None = None
    validation_path: str | None = None
    validation_split: str | None = None
    validation_fraction: float = 0.1
    evaluation_prompts: tuple[str, ...] = ()
    defects: Defects = field(default_factory=Defects)
    tokenizer_vocab_size: int = 2048
    revision: str | None = None
    split: str | None = None
    streaming: bool = False
    seed: int = 0
    limit: int | None = None
    anchored_costs: bool | None = None
    relabel: Relabel | None = None
    cache_dir: str | None = None

    @property
    def sources(self) -> list[Source]:
        """Where the training rows come from."""
        return [Source(path, self.revision, self.split, self.streaming) for path in self.paths]

    @property
    def validation_source(self) -> Source | None:
        """Where the validation rows come from, if not from the training rows."""
        if self.validation_path is None:
            return None
        hub = is_remote(self.validation_path)
        return Source(
            self.validation_path, self.revision if hub else None, self.validation_split, self.streaming and hub
        )

    @property
    def every_source(self) -> list[Source]:
        """Where rows come from, the validation rows last."""
        return [*self.sources, *([self.validation_source] if self.validation_source else [])]


def fingerprints(settings: PrepareSettings) -> dict[str, str]:
    """File name -> hash for everything that is read. Raises FormatError where something cannot be."""
    sources = [*settings.every_source, *(Source(path) for path in settings.evaluation_prompts)]
    return {name: sha for source in sources for name, sha in named_prints(source).items()}


def named_prints(source: Source) -> dict[str, str]:
    """`fingerprint` with whole paths, so that files of one name in two folders are told apart."""
    folder = Path(source.path) if Path(source.path).is_dir() else Path(source.path).parent
    hub = is_remote(source.path)
    return {name if hub else str(folder / name): sha for name, sha in fingerprint(source).items()}


def entry_key(settings: PrepareSettings, prints: dict[str, str], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The name of an entry: another for anything that could change its examples or its report."""
    values = dataclasses.asdict(settings)
    del values["cache_dir"]
    values["relabel"] = settings.relabel and f"{type(settings.relabel).__module__}.{settings.relabel!r}"
    if settings.template not in (None, "tokenizer"):
        values["template"] = template_text(str(settings.template))  # the text of a file, not its name
    if tokenizer is not None:
        values["tokenizer_vocab_size"] = None
    return key_of(
        {
            **values,
            "files": prints,
            "tokenizer": tokenizer and tokenizer_print(tokenizer),
            "versions": [version(name) for name in ("transformers", "tokenizers")],
            "sources": source_hashes(),
        }
    )


def tokenizer_print(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of the files that the tokenizer is saved as, wherever it was loaded from."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return folder_hashes(folder)


def source_hashes() -> dict[str, str]:
    """Hashes of the code of this package: a reader or a template that is corrected makes other examples."""
    return {path.name: file_hash(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
