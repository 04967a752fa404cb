"""The trainer's errors, as one tree; the command line maps a branch to an exit code.

TrainerError
|-- InputError          exit code 2: the user can fix it, and the message says how
|   |-- RecipeError     the recipe: an unknown key, a value out of range, a file that is not YAML
|   |-- DataError       the training data, every problem with its file and line
|   `-- BaseModelError  the base: not found, not safetensors, without a chat template
|-- TrainingError       exit code 1: the loss is not finite
`-- PublishError        exit code 1: the adapter cannot be written, or differs from the trained one
"""

from __future__ import annotations

from collections.abc import Sequence

NUM_SHOWN = 20


class TrainerError(Exception):
    """Anything the trainer reports instead of a traceback."""


class InputError(TrainerError):
    """A recipe, data or a base that cannot be used as it is."""


class RecipeError(InputError):
    """A recipe that is not valid."""


class BaseModelError(InputError):
    """A base that is missing or not readable."""


class DataError(InputError):
    """Training data with ``problems``, one ``file:line: text`` each; the first ``NUM_SHOWN`` make the message."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = "\n".join(f"  {problem}" for problem in problems[:NUM_SHOWN])
        hidden = len(problems) - NUM_SHOWN
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        super().__init__(f"the training data has {len(problems)} problem(s):\n{shown}{more}")


class TrainingError(TrainerError):
    """Training that diverged."""


class PublishError(TrainerError):
    """An adapter folder that cannot be written or failed its check; nothing was published."""
