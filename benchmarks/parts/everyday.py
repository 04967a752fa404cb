"""Twenty everyday questions, how a base answers them, and which of the answers end in a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.parts.perplexity import Comparison, Reader, compare
from server.text.prompt import PromptRenderer
from server.text.repetition import is_loop

QUESTIONS = (
    "List three fruits.",
    "What is the capital of Italy?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What is 17 plus 25?",
    "Translate 'Good morning, my friend' into French.",
    "Explain what a computer virus is to a child.",
    "Write an email to my boss: I am ill and stay at home today.",
    "Name the days of the week.",
    "What should I pack for a weekend at the beach?",
    "Tell me a joke.",
    "How can I fall asleep faster?",
    "Write a Python function that adds two numbers.",
    "Who wrote Romeo and Juliet?",
    "What is the difference between a frog and a toad?",
    "Suggest a name for my new kitten.",
    "How many legs does a spider have?",
    "Summarize the story of Cinderella in two sentences.",
)
MAX_TOKENS = 128
"""Of an answer."""


@dataclass(frozen=True)
class Answered:
    """Both bases' own greedy answers, and the second read on the first one's answers."""

    answers: Sequence[list[int]]
    other_answers: Sequence[list[int]]
    comparison: Comparison

    @property
    def num_same(self) -> int:
        """Answers that are equal, token by token."""
        return sum(a == b for a, b in zip(self.answers, self.other_answers, strict=True))


def ask(reader: Reader, floats: Reader, questions: Sequence[str] = QUESTIONS) -> Answered:
    """Greedy answers of both to each question by the base's chat template.

    ``comparison`` is of ``reader``'s probabilities of the tokens of ``floats``' answers, after the tokens before them.
    Raises ``InvalidRequest`` where the template refuses the question.
    """
    renderer = PromptRenderer(floats.base.tokenizer, vocab_size=floats.base.vocab_size)
    prompts = [renderer.chat([{"role": "user", "content": question}]) for question in questions]
    float_answers = floats.answers(prompts, max_tokens=MAX_TOKENS)
    windows = [[*prompt, *answer] for prompt, answer in zip(prompts, float_answers, strict=True)]
    comparison = compare(reader, floats, windows, num_given=[len(prompt) for prompt in prompts])
    return Answered(reader.answers(prompts, max_tokens=MAX_TOKENS), float_answers, comparison)


def num_loops(answers: Sequence[Sequence[int]]) -> int:
    return sum(map(is_loop, answers))
