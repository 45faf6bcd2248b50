"""Rows -> the records to train on, and an account of all others: what is wrong with which rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from rsa_lightning.data.columns import prompt_of
from rsa_lightning.data.formats import check_format, read_row
from rsa_lightning.data.quality import (
    INTENDED,
    WHY,
    Defects,
    contaminated,
    defects_of,
    evaluation_key,
    repeated,
)
from rsa_lightning.data.readers import Source, read_rows
from rsa_lightning.data.records import FormatError, Record, RowDefect, human_turns, row_of, with_row_id
from rsa_lightning.data.relabel import Relabel, relabelled

SHOWN_ROWS = 3  # row ids in a message; the report has all


@dataclass
class Ledger:
    """The account of a data set.

    Attributes:
        policies: what is done about a defect.
        rows: rows read.
        found: ids of the rows with a defect, by its name; a row may have several.
        dropped: ids of what was left out, each once, under the first reason.
        messages: what was wrong with the first row that could not be used, by the name of the defect.
    """

    policies: Defects
    rows: int = 0
    found: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def find(self, reason: str, row_ids: Iterable[str]) -> None:
        """Rows have this defect."""
        self.found.setdefault(reason, []).extend(row_ids)

    def drop(self, reason: str, row_ids: Iterable[str]) -> None:
        """Rows are left out for this reason."""
        self.dropped.setdefault(reason, []).extend(row_ids)

    def lose(self, reason: str, row_ids: Sequence[str], message: str | None = None) -> None:
        """Rows have this defect, and there is nothing of them to keep."""
        self.find(reason, row_ids)
        self.drop(reason, row_ids)
        message = message or WHY.get(reason)
        if message is not None:
            self.messages.setdefault(reason, f"{row_ids[0]}: {message}")

    def drops(self, reason: str) -> bool:
        """Whether rows with this defect are left out: where they make the run fail, they are not prepared either."""
        return self.policies.policy(reason) != "keep"

    def failures(self) -> list[str]:
        """One sentence for each defect whose policy is fail."""
        return [
            f"{reason}: {self.example(reason)}"
            for reason, row_ids in self.found.items()
            if row_ids and self.policies.policy(reason) == "fail"
        ]

    def example(self, reason: str) -> str:
        """How many rows have a defect, the first of them, and what was wrong with the first."""
        row_ids = self.found[reason]
        shown = ", ".join(row_ids[:SHOWN_ROWS]) + (", ..." if len(row_ids) > SHOWN_ROWS else "")
        message = self.messages.get(reason)
        return f"{len(row_ids)} of {self.rows} rows ({shown})" + (f"; {message}" if message else "")

    def too_many(self) -> str | None:
        """A sentence where something of more rows was dropped for defects than `max_dropped` allows."""
        faulty = {reason: ids for reason, ids in self.dropped.items() if ids and reason in self.found}
        for reason in ("contaminated", *INTENDED):
            faulty.pop(reason, None)
        counts = {reason: len(ids) for reason, ids in faulty.items()}
        rows = {row_of(row_id) for ids in faulty.values() for row_id in ids}
        share = len(rows) / max(self.rows, 1)
        if share <= self.policies.max_dropped:
            return None
        return (
            f"{share:.0%} of the data would be dropped ({listed(counts)}), and defects.max_dropped is "
            f"{self.policies.max_dropped:g}: is this the right format and criterion? {self.most(counts)}"
        )

    def most(self, counts: Mapping[str, int]) -> str:
        """The most frequent of these defects, with an example."""
        worst = max(counts, key=lambda reason: counts[reason])
        return f"Most are {worst}: {self.example(worst)}"


def listed(counts: dict[str, int]) -> str:
    """`empty 2, identical 1`"""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "none"


def read_records(
    source: Source,
    format: str,
    criterion: str | None,
    limit: int | None,
    ledger: Ledger,
    place: str = "",
    relabel: Relabel | None = None,
) -> list[Record]:
    """The records of a source, relabelled, named by `place` and their rows. What gives none is entered into the ledger.

    Raises:
        FormatError: unknown format or criterion; the source is missing, empty or damaged as a whole.
    """
    check_format(format, criterion)
    records: list[Record] = []
    for name, row in islice(read_rows(source), limit):
        row_id = place + name
        ledger.rows += 1
        try:
            if isinstance(row, FormatError):
                raise row
            records += with_row_id(relabelled(read_row(format, row, criterion), relabel), row_id)
        except RowDefect as defect:
            ledger.lose(defect.reason, [row_id])
        except FormatError as error:
            ledger.lose("wrong_type", [row_id], str(error))
    return records


def sift(records: Sequence[Record], evaluation_keys: set[str], ledger: Ledger, anchored: bool = True) -> list[Record]:
    """The records without those that a policy drops; every defect is entered into the ledger."""
    reasons: dict[int, str] = {}
    for reason, indices in defects(records, evaluation_keys, anchored).items():
        ledger.find(reason, [records[i].row_id for i in indices])
        if ledger.drops(reason):
            for i in indices:
                reasons.setdefault(i, reason)
    for i in sorted(reasons):
        ledger.drop(reasons[i], [records[i].row_id])
    return [record for i, record in enumerate(records) if i not in reasons]


def defects(records: Sequence[Record], evaluation_keys: set[str], anchored: bool) -> dict[str, list[int]]:
    """The indices of the records with each defect; the first defect of a record is the one it is dropped for."""
    found: dict[str, list[int]] = {"empty": [], "identical": [], "contradictory": [], "duplicate": []}
    for i, record in enumerate(records):
        for reason in defects_of(record, anchored):
            found[reason].append(i)
    together = repeated(records)
    found["contradictory"] = sorted({*found["contradictory"], *together["contradictory"]})
    found["duplicate"] = together["duplicate"]
    found["contaminated"] = contaminated(records, evaluation_keys)
    return {reason: indices for reason, indices in found.items() if indices}


def evaluation_keys(paths: Iterable[str]) -> set[str]:
    """What no training prompt may say: the human turns of every `prompt` in these files, by `evaluation_key`.

    Raises:
        FormatError: a row without a prompt, named; a file that is missing or damaged.
    """
    keys: set[str] = set()
    for path in paths:
        for row_id, row in read_rows(Source(path)):
            try:
                if isinstance(row, FormatError):
                    raise row
                keys.update(evaluation_key(turn) for turn in human_turns(prompt_of(row)))
            except (FormatError, RowDefect) as error:
                raise FormatError(f"evaluation_prompts {path}, {row_id}: {error}") from None
    return keys
