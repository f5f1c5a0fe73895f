"""Unit 11: speculation, or several tokens for one reading of the weights, on the real engine."""

from __future__ import annotations

import random

from twostroke.bench.variants import Arrival, Variant, VariantBench
from twostroke.exec.local import RunnerSizes
from twostroke.lab.question import Question
from twostroke.lab.unit import Curves, Findings, Setup
from twostroke.policies.names import PolicyChoice

IDEA = """A decode step has arithmetic to spare: to check five guessed tokens takes hardly longer
than to draw one. Guesses may come from a small model, or from the text so far, where the last
words have stood before (prompt lookup). Those that the model would have drawn itself are kept, so
the answer is the same tokens in fewer steps; where nothing repeats, nothing is gained (Leviathan
et al. 2023)."""
_NEW_TOKENS = 64


def run(setup: Setup) -> Findings:
    """A prompt that repeats itself, answered with guesses from it and without."""
    sizes = RunnerSizes(setup.threads, 64, 16, 512)
    rng = random.Random(11)
    with VariantBench(setup.model, sizes) as bench:
        phrase = tuple(rng.randrange(300, min(bench.spec.vocab_size, 40_000)) for _ in range(24))
        load = [Arrival(0.0, phrase * 8, _NEW_TOKENS)]
        bench.run(Variant(name="warm"), [Arrival(0.0, phrase, 2)])
        plain = bench.run(Variant(name="a token a step"), load)
        guessing = bench.run(
            Variant(name="prompt lookup", policies=PolicyChoice(drafts=True)), load
        )
    curves = {}
    for one in (plain, guessing):
        times = [1e3 * (at - one.requests[0].token_s[0]) for at in one.requests[0].token_s]
        curves[one.variant.name] = (times, list(range(1, len(times) + 1)))
    drafts, accepted = (sum(getattr(step, name) for step in guessing.steps) for name in
                        ("drafts", "accepted"))  # fmt: skip
    same = plain.answers == guessing.answers
    lines = (
        f"a token a step: {len(plain.steps)} steps, {1e3 * plain.requests[0].tpot_s:.2f} ms a "
        "token",
        f"prompt lookup: {len(guessing.steps)} steps, {1e3 * guessing.requests[0].tpot_s:.2f} ms a "
        f"token; {accepted} of {drafts} guesses were right",
        f"The answers are {'the same tokens' if same else 'NOT THE SAME'}.",
    )
    picture = Curves(
        f"{setup.model}: when each token came, from the first on",
        ("ms since the first token", "tokens"),
        curves,
        ("linear", "linear"),
    )
    numbers = {"plain_steps": float(len(plain.steps)), "steps": float(len(guessing.steps)),
               "same": float(same)}  # fmt: skip
    return Findings(lines, numbers, picture.draw)


def ask_tokens(percent: int, guesses: int) -> Question:
    """Expected tokens of a step (Leviathan et al. 2023, eq. 1)."""
    rate = percent / 100
    expected = (1 - rate ** (guesses + 1)) / (1 - rate)
    return Question(
        f"Each of {guesses} guesses is right with probability {rate:g}, on its own. How many "
        "tokens does a step give in the mean?",
        expected,
        "tokens",
        f"1 + α + … + α^{guesses} = (1 − α^{guesses + 1}) / (1 − α) = {expected:.3f} for α = "
        f"{rate:g}: the first wrong guess ends it, and the model's own token comes on top.",
    )


def draw_tokens(rng: random.Random) -> Question:
    """The same with other numbers."""
    return ask_tokens(rng.choice((30, 50, 60, 70, 80, 90)), rng.randint(2, 7))
