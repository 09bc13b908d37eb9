"""Text for tokenizer comparisons: a small corpus to train on, and inputs that are hard to split."""

from __future__ import annotations

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.",
    "Don't say it's done; they're not there yet, I'll wait and we've seen 12 of 345 pages.",
    "你好，世界！今天天气很好，我们去公园散步吧。语言模型在边缘设备上运行。",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\t# 3",
    "Größe, naïve, façade, señor, Ωmega, привет мир, 한국어 문장",
] * 8
SAMPLES = [
    *CORPUS[:5],
    "",
    " ",
    "   three spaces,  two  spaces, trailing  ",
    "\n\n  1 2345 6.78e9\r\n\ttab",
    "word1word22word333 4444",
    "IT'S THEY'RE don't x'y",
    "emoji 😀 👩‍👩‍👧 and ﬁ ligature, e\u0301 combining",
    "a+b==c; x[1]<y|z^~`$ -- ...!?",
    "\u2581 already a lower one eighth block",
    "unseen Ꙃ character",
]
