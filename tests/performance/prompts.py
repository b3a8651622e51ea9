"""Prompts of several kinds, our own: what a person might ask, with and without text to copy from."""

import builtins
import contextlib
import io
import json
import keyword
import tokenize
from collections import Counter
from collections.abc import Collection
from pathlib import Path

TOP = Path(__file__).parents[2]
EDIT_LINES = 60
NEW_NAME = "parcel"
NOT_TO_RENAME = {*keyword.kwlist, *dir(builtins), "self"}

PROMPTS = [
    # questions
    "Why does the sky look blue during the day and red at sunset?",
    "What is the difference between a virus and a bacterium? Answer in three sentences.",
    "Give me five tips for sleeping better.",
    # code
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    """Add a docstring to this function and return all of its code:

def mean(values):
    if not values:
        raise ValueError("mean of no values")
    total = 0.0
    for value in values:
        total += value
    return total / len(values)""",
    """Rename the variable `a` to `account` everywhere and return the whole code:

def transfer(a, target, amount):
    if amount <= 0:
        raise ValueError("amount must be positive")
    if a.balance < amount:
        raise ValueError("balance too low")
    a.balance -= amount
    target.balance += amount
    a.history.append(("out", amount))""",
    # rewriting
    """Correct the spelling and repeat the whole text:

The libary opens at nine o'clock in the morning and closes at six in the evening. On Satudays it opens at ten. \
Members may borow up to eight books at a time and keep them for four weeks.""",
    """Rewrite this message so that it sounds polite:

Your report is late again. I need the numbers for March today, not tomorrow. Send the report and the numbers to me \
and to Anna before five o'clock.""",
    # summaries
    """Summarize this paragraph in one sentence:

The harbour was built in 1854 with a single stone pier and room for thirty-six boats. Fishing began before sunrise \
and ended when the market opened at nine. The catch was carried up the hill in baskets, counted and sold by weight. \
Today the pier is twice as long, the engines are quieter and the forecast arrives by radio, but every captain still \
looks at the sky before leaving.""",
    """List the three main points of this text:

Bees find their way by the sun, by landmarks and by scent. A bee that has found food tells the others by a dance: \
its angle gives the direction relative to the sun, its length gives the distance. On cloudy days the bees read the \
polarization of the light, which shows them where the sun stands behind the clouds.""",
    # translation
    "Translate into French: The train to Lyon leaves at half past seven from platform two.",
    "Translate into Spanish: My sister works in a hospital and her husband teaches music at a small school.",
    # arithmetic
    "A shop sells pencils in packs of 12. Tom buys 7 packs and gives away 15 pencils. How many are left? Step by step.",
    "A train travels 180 km in 2 hours and then 120 km in 3 hours. What is its average speed? Show each step.",
    # extraction
    """List every person with their town, one on a line:

Maria Lopez lives in Valencia and her brother Juan Lopez in Madrid. Their friend Peter Novak moved from Prague to \
Vienna last year, and Aiko Tanaka, who met them all in Lisbon, now lives in Osaka.""",
    """Give the order number, the date and the total of this message as JSON:

Dear customer, thank you for your order 48213 of 14 March. Two lamps (39.90 each) and one shelf (64.50) will be \
sent to you within three days. The total is 144.30 including delivery.""",
]


def spread(prompts: list[str], count: int) -> list[str]:
    """`count` prompts, evenly spread over the list."""
    return prompts[:: max(1, len(prompts) // max(count, 1))][:count]


def edits() -> list[str]:
    """Tasks whose answers are mostly copied: the beginning of a file of this repository, with one name changed."""
    files = sorted(file for part in ("common", "router", "worker") for file in (TOP / part).glob("*.py"))
    beginnings = (file.read_text(encoding="utf-8").splitlines()[:EDIT_LINES] for file in files)
    return [edit("\n".join(lines)) for lines in beginnings if len(lines) == EDIT_LINES]


def edit(text: str) -> str:
    """The text with its commonest name to be changed."""
    return f"Repeat this file with every `{commonest_name(text)}` renamed to `{NEW_NAME}`:\n\n{text}"


def commonest_name(code: str) -> str:
    """The name that stands most often in Python code, which may break off anywhere; of equals the first."""
    names: Counter[str] = Counter()
    with contextlib.suppress(tokenize.TokenError):
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.NAME and token.string not in NOT_TO_RENAME:
                names[token.string] += 1
    return names.most_common(1)[0][0]


def read(path: Path, max_chars: int, categories: Collection[str] = ()) -> list[str]:
    """First turns of a JSON-lines file of `{"category": ..., "turns": [...]}` (Spec-Bench's form), not too long.

    Of `categories` only, if there are any. Raises `ValueError` for one that the file does not have.
    """
    with path.open(encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines if line.strip()]
    known = {question.get("category", "") for question in questions}
    if unknown := sorted(set(categories) - known):
        raise ValueError(f"{path} has no category {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    turns: list[str] = [q["turns"][0] for q in questions if not categories or q["category"] in categories]
    return [turn for turn in turns if len(turn) <= max_chars]
