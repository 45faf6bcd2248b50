"""Tables and plain sentences for the report, from the numbers alone: the same words whichever way a result goes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rsa_lightning.evaluation.samples import Sample

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
ABSENT = "–"


class Change(NamedTuple):
    """after − before of one figure, with its 95 % interval, both models on the same prompts."""

    before: str
    after: str
    figure: str
    estimate: float
    low: float
    high: float


# key -> (label, shown as a percentage)
LABELS = {
    "reward_mean": ("mean reward", False),
    "cost_mean": ("mean cost", False),
    "unsafe_rate": ("unsafe rate, P(cost > 0)", True),
    "cost_cvar/0.9": ("mean cost of the worst 10 %", False),
    "cost_cvar/0.95": ("mean cost of the worst 5 %", False),
    "cost_cvar/0.99": ("mean cost of the worst 1 %", False),
    "cost_var/0.9": ("cost exceeded by at most 10 %", False),
    "cost_var/0.95": ("cost exceeded by at most 5 %", False),
    "cost_var/0.99": ("cost exceeded by at most 1 %", False),
    "cost_cantelli/0.9": ("Cantelli bound on VaR 0.9", False),
    "cost_cantelli/0.95": ("Cantelli bound on VaR 0.95", False),
    "cost_cantelli/0.99": ("Cantelli bound on VaR 0.99", False),
    "kl_to_start": ("KL to start, nats per answer", False),
}
TAIL_FIGURES = ("cost_var", "cost_cantelli")  # in the table of the tail, not in the main one
FURTHER_LABELS = {
    "expected_excess": ("expected excess, E[max(cost, 0)]", False),
    "worst_of_n": ("worst answer per prompt, mean cost", False),
    "unsafe_answers": ("unsafe answers", False),
    "largest_cost": ("largest cost", False),
    "unsafe_upper": ("unsafe rate, upper bound", True),
}
PREFERENCE_LABELS = {
    "pairs": ("pairs", False),
    "reward_accuracy": ("reward accuracy", True),
    "logp_accuracy": ("log-prob accuracy", True),
    "margin": ("margin", False),
    "chosen_logp": ("log p chosen", False),
    "rejected_logp": ("log p rejected", False),
    "kl": ("KL", False),
    "risk": ("risk", False),
}
CHANGE_NOUNS = {
    "unsafe_rate": "the unsafe rate",
    "cost_cvar/0.99": "the mean cost of the worst 1 %",
    "reward_mean": "mean reward",
}
FEW = 10  # unsafe answers, below which the tail of a model is a handful of events
FEW_PAIRS = 30  # below which an accuracy is not held against chance
BRIEF_PREFERENCES = ("pairs", "reward_accuracy", "logp_accuracy", "margin", "kl")
DEFINITIONS = """\
Brackets are 95 % bootstrap intervals that resample prompts, all answers to a prompt together. An answer is unsafe if
its cost is above 0. The mean cost of the worst 10, 5 and 1 % of answers is CVaR at level 0.9, 0.95 and 0.99. *KL to
start* is the mean of log p(answer) − log p_start(answer) over answers sampled from the model itself, in nats per
answer; start is the model that alignment started from. It is absent if the sampler was not the model's own
distribution. There is one training run per model: no interval contains the variation between runs."""
CHANGE_DEFINITIONS = """\
Later minus earlier model, with 95 % intervals from resampling the same prompts for both. The words above call a change
clear if its interval leaves out 0."""
FURTHER_DEFINITIONS = """\
The cost exceeded by at most 10, 5 and 1 % of answers is VaR at level 0.9, 0.95 and 0.99. The *upper bound* on the
unsafe rate is the one-sided 95 % Clopper-Pearson bound, which takes answers as independent. The *Cantelli bound* at a
level is mean + sqrt(level / (1 − level)) × standard deviation; no law with that mean and deviation has a larger VaR."""
PREFERENCE_DEFINITIONS = """\
*Reward accuracy* is the share of pairs whose chosen response gained more log-probability since the start model than
the rejected one did (a tie is half); chance is 50 %. *Log-prob accuracy* is the share whose chosen response the model
itself finds more probable; longer responses are less probable, so 50 % is no yardstick there. The margin is the
difference of the two gains. *KL* here is the forward one, KL(start ‖ model), summed over the tokens of the given
responses, and *risk* the nested risk measure in its place. Margin, log-probabilities, KL and risk are nats per
response."""


def tables(found: Mapping[str, Any], *, brief: bool = False) -> list[Table]:
    """The main table, figures down and models across, and the preference table if there is one."""
    models = found["models"]
    shown = [_figure_table("Sampled answers", [k for k in LABELS if not k.startswith(TAIL_FIGURES)], models)]
    if any(model.get("preference") for model in models):
        shown.append(_preference_table(models, BRIEF_PREFERENCES if brief else tuple(PREFERENCE_LABELS)))
    return shown


def report(
    found: Mapping[str, Any],
    changes: Sequence[Change],
    further: Mapping[str, Mapping[str, float] | None],
    pictures: Sequence[tuple[str, str]],
    about: Sequence[Mapping[str, str]] = (),
) -> str:
    """report.md; `pictures` are (file name, caption), `about` are rows on what was run."""
    models = found["models"]
    parts = ["# Results", findings(models, changes, further)]
    if about:
        parts += ["## The run", markdown(("", list(about[0]), [list(row.values()) for row in about]))]
    for table, definition in zip(tables(found), (DEFINITIONS, PREFERENCE_DEFINITIONS), strict=False):
        parts += [f"## {table[0]}", markdown(table), definition]
    if changes:
        parts += ["## Changes", markdown(_change_table(changes)), CHANGE_DEFINITIONS]
    parts += [f"![{caption}]({name})\n\n{caption}" for name, caption in pictures]
    if any(further.values()):
        parts += ["## The tail of the cost", markdown(_tail_table(models, further)), FURTHER_DEFINITIONS]
    return "\n\n".join(parts) + "\n"


def findings(
    models: Sequence[Mapping[str, Any]], changes: Sequence[Change], further: Mapping[str, Mapping[str, float] | None]
) -> str:
    """What the numbers show, in words: one line each."""
    by_name = {model["name"]: model for model in models}
    sentences = [
        _change_sentence(
            by_name[before], by_name[after], [c for c in changes if (c.before, c.after) == (before, after)]
        )
        for before, after in dict.fromkeys((c.before, c.after) for c in changes)
    ]
    for model in models:
        if model["unsafe_rate"] == 0 and (bounds := further.get(model["name"])):
            sentences.append(
                f"None of the scored answers of `{model['name']}` is unsafe; that rules out rates above "
                f"{number(bounds['unsafe_upper'], percent=True)} (95 % confidence, answers taken as independent)."
            )
        elif (bounds := further.get(model["name"])) and bounds["unsafe_answers"] < FEW:
            count = f"{bounds['unsafe_answers']:.0f} of the scored answers of `{model['name']}` "
            count += "is" if bounds["unsafe_answers"] == 1 else "are"
            upper = number(bounds["unsafe_upper"], percent=True)
            sentences.append(
                f"Only {count} unsafe, with costs up to {number(bounds['largest_cost'])}: too few to tell how heavy "
                f"the tail is. The unsafe rate is below {upper} (95 % confidence, answers taken as independent)."
            )
        if model.get("unscored"):
            sentences.append(
                f"{model['unscored']} of {model['samples']} answers of `{model['name']}` have no score: left out."
            )
        sentences += _preference_sentences(model)
    if all(model["cost_mean"] is None and model["reward_mean"] is None for model in models):
        sentences.insert(0, "No answers were scored, so reward and cost are not known.")
    return "\n".join(f"- {sentence}" for sentence in sentences)


def examples(chosen: Iterable[tuple[str, Sequence[tuple[str, Sample]]]]) -> str:
    """Some prompts with each model's first answer; indented, so that nothing in a text is read as Markdown."""
    parts = [
        "## Examples",
        "The first answer of each model to three prompts spread evenly over the evaluation set; not picked by score.",
    ]
    for prompt, answers in chosen:
        parts += ["**Prompt**", _verbatim(prompt)]
        for name, sample in answers:
            parts += [f"`{name}`: reward {number(sample.reward)}, cost {number(sample.cost)}", _verbatim(sample.text)]
    return "\n\n".join(parts) + "\n"


def markdown(table: Table) -> str:
    _, header, rows = table
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows)
    )


def number(value: float | None, *, percent: bool = False, sign: bool = False, like: float | None = None) -> str:
    """About three significant digits; the size of `like` sets the decimals of an interval."""
    if value is None:
        return ABSENT
    if isinstance(value, int):
        return str(value)
    if percent:
        decimals = 2 if 0 < abs(100 * (value if like is None else like)) < 1 else 1
        value = 100 * value
    else:
        size = abs(value if like is None else like)
        decimals = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:{'+' if sign else ''}.{decimals}f}".replace("-", "−")
    return text + (" %" if percent else "")


def with_interval(
    value: float | None, interval: Sequence[float] | None, *, percent: bool = False, sign: bool = False
) -> str:
    if value is None or interval is None:
        return number(value, percent=percent, sign=sign)
    like = max(abs(value), *map(abs, interval))
    low, high = (number(bound, percent=percent, sign=sign, like=like).removesuffix(" %") for bound in interval)
    return f"{number(value, percent=percent, sign=sign, like=like)} [{low}, {high}]"


def _change_sentence(before: Mapping[str, Any], after: Mapping[str, Any], changes: Sequence[Change]) -> str:
    by_figure = {change.figure: change for change in changes}
    clauses = [_clause(by_figure[key], before, after, noun) for key, noun in CHANGE_NOUNS.items() if key in by_figure]
    said = " and ".join([*([", ".join(clauses[:-1])] if clauses[:-1] else []), clauses[-1]])
    return f"From `{before['name']}` to `{after['name']}`, {said}."


def _clause(change: Change, before: Mapping[str, Any], after: Mapping[str, Any], noun: str) -> str:
    percent = LABELS[change.figure][1]
    (start, _), (end, _) = _figure(before, change.figure), _figure(after, change.figure)
    first, last = (with_interval(*_figure(model, change.figure), percent=percent) for model in (before, after))
    if change.low <= 0 <= change.high:
        return f"{noun} shows no clear change ({first}, then {last})"
    verb = "rose" if change.estimate > 0 else "fell"
    factor = f" ({end / start:.2f} times)" if percent and start and end and end / start >= 0.005 else ""
    return f"{noun} {verb} from {first} to {last}{factor}"


def _preference_sentences(model: Mapping[str, Any]) -> list[str]:
    sentences = []
    for criterion, splits in (model.get("preference") or {}).items():
        held_out, training = splits.get("held_out") or {}, splits.get("training") or {}
        # the start model itself has gained nothing on any response: its implicit reward says nothing
        bare = held_out.get("reward_accuracy") is None or held_out.get("margin") == 0
        key, how = ("logp_accuracy", "finds more probable") if bare else ("reward_accuracy", "has come to favour")
        accuracy, interval = held_out.get(key), (held_out.get("ci95") or {}).get(key)
        if accuracy is None:
            continue
        seen = f" (training pairs: {number(training[key], percent=True)})" if training.get(key) is not None else ""
        verdict = _against_chance(interval, held_out.get("pairs", 0))
        sentences.append(
            f"On {held_out.get('pairs', 'the')} held-out {criterion} pairs `{model['name']}` {how} the chosen one in "
            f"{with_interval(accuracy, interval, percent=True)}{verdict}{seen}."
        )
    return sentences


def _against_chance(interval: Sequence[float] | None, pairs: int) -> str:
    if interval is None or pairs < FEW_PAIRS:
        return ""
    low, high = interval
    return ", above one half" if low > 0.5 else ", below one half" if high < 0.5 else ", which may be chance"


def _change_table(changes: Sequence[Change]) -> Table:
    rows = []
    for before, after in dict.fromkeys((c.before, c.after) for c in changes):
        of_pair = {c.figure: c for c in changes if (c.before, c.after) == (before, after)}
        cells = []
        for key in CHANGE_NOUNS:
            change, percent = of_pair.get(key), LABELS[key][1]
            bounds = None if change is None else (change.low, change.high)
            cells.append(
                with_interval(change and change.estimate, bounds, percent=percent, sign=True).replace("%", "points")
            )
        rows.append([f"{before} → {after}", *cells])
    return "Changes", ["", *(LABELS[key][0] for key in CHANGE_NOUNS)], rows


def _figure(model: Mapping[str, Any], key: str) -> tuple[float | None, Sequence[float] | None]:
    group, _, level = key.partition("/")
    value, interval = model[group], model["ci95"][group]
    return (value[level], interval[level]) if level else (value, interval)


def _figure_table(title: str, keys: Sequence[str], models: Sequence[Mapping[str, Any]]) -> Table:
    rows = [[LABELS[k][0], *(with_interval(*_figure(m, k), percent=LABELS[k][1]) for m in models)] for k in keys]
    rows.append(["answers", *(str(model["samples"]) for model in models)])
    return title, ["", *(model["name"] for model in models)], rows


def _tail_table(models: Sequence[Mapping[str, Any]], further: Mapping[str, Mapping[str, float] | None]) -> Table:
    title, header, rows = _figure_table("", [key for key in LABELS if key.startswith(TAIL_FIGURES)], models)
    found = [further.get(model["name"]) or {} for model in models]
    rows[-1:] = [
        [label, *(number(f.get(k), percent=percent) for f in found)] for k, (label, percent) in FURTHER_LABELS.items()
    ]
    return title, header, rows


def _preference_table(models: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Table:
    rows = []
    for model in models:
        for criterion, splits in (model.get("preference") or {}).items():
            for split, figures in splits.items():
                figures, ci95 = figures or {}, (figures or {}).get("ci95") or {}
                cells = (with_interval(figures.get(k), ci95.get(k), percent=PREFERENCE_LABELS[k][1]) for k in keys)
                rows.append([f"{model['name']}, {criterion}, {split.replace('_', '-')}", *cells])
    return "Preference pairs", ["model, criterion, split", *(PREFERENCE_LABELS[key][0] for key in keys)], rows


def _verbatim(text: str) -> str:
    return "\n".join("    " + line for line in (text.strip() or "(empty)").splitlines())
