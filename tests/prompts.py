"""Forty fixed prompts, by name: short, long, in other scripts, code, and of the chat template.

Several long ones begin alike, so that together they share prefixes of hundreds of tokens. Their
reference answers are in data/smollm2_greedy.json: after a change here, make that file again.
"""

from __future__ import annotations

LIGHTHOUSE = """\
The lighthouse at Skerry Point was built in 1868, after the third wreck in as many winters. Its \
keeper, a man named Duncan Rae, lived there with his wife and four children in three small rooms \
under the lamp. Every evening he climbed one hundred and twelve steps with a can of oil in each \
hand, trimmed the wick, wound the clockwork that turned the lens, and wrote the weather in a book.

"""
BEES = """\
A colony of honeybees has one queen, some hundreds of drones and up to fifty thousand workers. A \
worker that has found a rich patch of flowers returns to the hive and dances on the comb: the \
angle of her run tells the direction relative to the sun, and its length tells the distance. Her \
sisters follow the dance in the dark, with their antennae, and then fly straight to the flowers.

"""
MINUTES = """\
Minutes of the water board, 14 March. Present: Ms. Okafor (chair), Mr. Lindqvist, Dr. Haddad, \
Mr. Pereira. Absent: Ms. Novak. 1. The minutes of 12 February were approved without changes. \
2. Pump station 3 failed twice, on 19 and 27 February, for 4.5 and 11 hours. Mr. Lindqvist \
reported that the bearings must be replaced; the offer of 18,400 euros was accepted by 3 votes \
to 1. 3. Dr. Haddad presented the samples of the north well: nitrate 31 mg/l, limit 50 mg/l.

"""
RECIPE = """\
Lentil soup for six people. Rinse 400 g of brown lentils. Chop two onions, three carrots and two \
stalks of celery, and cook them slowly in four spoons of olive oil until they are soft, about ten \
minutes. Add two cloves of garlic, a spoon of cumin and a pinch of chili. Add the lentils, a can \
of tomatoes and two litres of water. Simmer for forty minutes; salt only at the end. Serve with \
lemon and bread.

"""
TRADE = """\
In the fourteenth century a sack of pepper travelled from the Malabar coast to the markets of \
Bruges in about a year and a half. It changed hands at least nine times: Gujarati ship owners, \
merchants of Aden and Cairo, customs officers at Alexandria, Venetian galleys, mule drivers over \
the Brenner pass, and the brokers of the Rhine. At every stop a toll was paid, and at every stop \
the price went up, so that in Flanders it cost some thirty times what the farmer had been given.

"""
GEARS = """\
A bicycle with two chainrings and eleven sprockets has twenty-two gears, but not twenty-two \
different ones. With rings of 50 and 34 teeth and sprockets from 11 to 32, the ratios run from \
1.06 to 4.55, and seven of the combinations differ by less than three per cent. Riders therefore \
use about fourteen of them: the small ring with the large sprockets uphill, the large ring with \
the small sprockets downhill, and the middle of both on the flat.

"""
PAPERS = LIGHTHOUSE + BEES + MINUTES


def chat(*turns: str, system: str | None = None) -> str:
    """The prompt for a conversation whose turns are the user's and the assistant's by turns."""
    system = system or "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    parts = [f"<|im_start|>system\n{system}<|im_end|>\n"]
    for number, turn in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        parts.append(f"<|im_start|>{role}\n{turn}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


PROMPTS = {
    "short-one-letter": "A",
    "short-newline": "\n",
    "short-france": "The capital of France is",
    "short-story": "Once upon a time, in a village by the sea,",
    "short-counting": "1, 2, 3, 4, 5, 6, 7,",
    "short-days": "Monday, Tuesday, Wednesday,",
    "short-definition": "Photosynthesis is the process by which",
    "short-question": "Q: Why is the sky blue?\nA:",
    "short-list": "Five things to pack for a week in the mountains:\n1.",
    "short-letter": "Dear Sir or Madam,\n\nI am writing to",
    "short-spaces": "   indented    by   spaces\t\tand tabs   ",
    "long-lighthouse": LIGHTHOUSE + "One night in November",
    "long-bees": BEES + "Question: How do bees tell each other where flowers are?\nAnswer:",
    "long-two": LIGHTHOUSE + BEES + "Both texts are about",
    "long-three": PAPERS + "A summary of the three texts above in one sentence:",
    "long-minutes": PAPERS + "4. The chair closed the meeting and",
    "long-four": PAPERS + RECIPE + "The text that does not fit with the others is",
    "long-six": PAPERS + RECIPE + TRADE + GEARS + "In short, the six texts tell us that",
    "long-other-order": GEARS + TRADE + RECIPE + "Question: What did pepper cost?\nAnswer:",
    "long-repeated": "the quick brown fox jumps over the lazy dog. " * 30,
    "unicode-german": "Der Zug nach München fährt über Würzburg, weil die Strecke",
    "unicode-french": "Où est passé l’élève ? Il a oublié son déjeuner, ses œufs et",
    "unicode-emoji": "I love pizza 🍕🍕 and my family 👨‍👩‍👧‍👦! 🎉 What about you? 😀",
    "unicode-chinese": "北京是中国的首都。上海是",
    "unicode-japanese": "むかしむかし、あるところに、おじいさんと",
    "unicode-korean-arabic": "안녕하세요, 반갑습니다. مرحبا بالعالم. שלום",
    "unicode-combining": "e\u0301 n\u0303 a\u0308 \u200b zero\u200dwidth \ufeff and \U0001d4d0 "
    "maths ∑∫√≠",
    "unicode-cyrillic": "Москва — столица России, а Киев — столица",
    "code-python": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "code-c": "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {\n",
    "code-json": '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "works": [',
    "code-sql": "SELECT customers.name, SUM(orders.total) FROM customers JOIN",
    "code-html": '<!DOCTYPE html>\n<html>\n  <head>\n    <meta charset="utf-8">\n    <title>',
    "code-shell": "#!/bin/bash\nset -euo pipefail\nfor file in *.txt; do\n    ",
    "chat-france": chat("What is the capital of France?"),
    "chat-system": chat("Tell me about the sea.", system="You answer in exactly one sentence."),
    "chat-turns": chat("My name is Mira.", "Hello Mira, how can I help?", "What is my name?"),
    "chat-code": chat("Write a Python function that reverses a string."),
    "chat-emoji": chat("Translate to French: Good morning! ☀️ How are you? 你好"),
    "chat-long": chat(PAPERS + "How long did pump station 3 fail in February, in all?"),
}

# every kind, the longest, the shortest, two that share a prefix and some that end by themselves
SUBSET = (
    "short-newline",
    "short-france",
    "short-spaces",
    "long-three",
    "long-minutes",
    "long-six",
    "unicode-emoji",
    "code-python",
    "chat-france",
    "chat-turns",
)
