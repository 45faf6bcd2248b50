"""What a parser or another library says about an error, in words for the user."""

import re

# lines of a jsonargparse message that say how it validates, not what is wrong
_PARSER_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
_CLASSES = (
    "losses: DPO, IPO, TDPO, RSA, KTO; risks: KL, CVaR, ERM; cost transforms: MeanCost, Indicator, Hinge, Exponential"
)


def plain_message(error: Exception) -> str:
    """The message of a parser's error in one line: `model: SafetyAlignment: Option 'beat' is not accepted`."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(_PARSER_NOISE)]
    # where a class is wanted, what a plain word would have been is of no use
    text = " ".join([line for line in lines if line != "Expected a <class 'str'>"] or lines)
    text = text.replace("No supported gpu backend found!", "there is no GPU here; --trainer.accelerator cpu needs none")
    text = re.sub(r"Expected a path but (\S+) either not accessible or invalid ?", "", text)
    text = re.sub(r"Expected a dot import path string: (\S+)", rf"there is no class \1; {_CLASSES}", text)
    text = re.sub(r'Parser key "([^"]*)":', r"\1:", text)
    return re.sub(r"Problem with given class_path '(?:[^']*\.)?([^'.]+)':", r"\1:", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next if it only announces it, or its type if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
