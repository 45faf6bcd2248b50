"""The 240 questions of the story world, split for tuning, for testing, and for a shift of distribution."""

from typing import Literal

from rsa_lightning import stories
from rsa_lightning.stories import StoryPrompt

Split = Literal["training", "validation", "test", "shifted"]
MEASURED: tuple[Split, ...] = ("validation", "test", "shifted")


def split_prompts() -> dict[Split, list[StoryPrompt]]:
    """Prompts by split; none is in two, and no seed changes them.

    shifted      all questions about the last task of each hazard: no training data asks for it
    test         of the other tasks, the combinations of task and company that `stories.prompts` tests on
    validation   every fifth of the remaining ones: λ grids and selections look at these
    training     the rest: every other task in most companies
    """
    last = {kind.tasks[-1] for kind in stories.KINDS.values()}
    train, test = stories.prompts()
    rest = [prompt for prompt in train if prompt.task not in last]
    return {
        "training": [prompt for i, prompt in enumerate(rest) if i % 5 != 2],
        "validation": [prompt for i, prompt in enumerate(rest) if i % 5 == 2],
        "test": [prompt for prompt in test if prompt.task not in last],
        "shifted": [prompt for prompt in train + test if prompt.task in last],
    }
