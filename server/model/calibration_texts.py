"""Texts of several kinds for the calibration of outlier channels.

A channel that is large on program text need not be so in a story: one kind of text alone would miss it.
"""

from __future__ import annotations

ENGLISH = (
    "The ferry was late again, and the people on the pier had stopped looking at the clock. A woman in a grey coat "
    "read the same page of her book twice. 'Does it always take this long?' asked the boy beside her. She closed the "
    "book. 'Only when you are waiting for somebody,' she said, and both of them laughed."
)
CHINESE = (
    "下午三点,雨终于停了。街角的小店重新打开了门,老板把椅子一把一把搬到外面。"
    "请问从这里到火车站要走多久?大约十五分钟,过了桥往左拐就到。"
    "机器学习模型从大量文本中学习词语之间的关系,然后逐字生成回答。"
)
RUSSIAN = (
    "Утром в деревне выпал первый снег, и дети побежали к реке смотреть, не замёрзла ли вода. Старый учитель стоял у "
    "окна и улыбался. «Сколько лет я это вижу, — сказал он жене, — а всё как в первый раз». Температура опустилась до "
    "минус восьми градусов."
)
PYTHON = '''\
def count_words(path: str, *, limit: int = 10) -> list[tuple[str, int]]:
    """The most frequent words of a file."""
    counts: dict[str, int] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            for word in line.lower().split():
                counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])[:limit]
'''
DATA = """\
{"id": 4711, "name": "Blue lamp", "price": 39.9, "tags": ["home", "light"], "stock": {"Oslo": 3, "Lima": 0}}
| city | 2019 | 2024 |
|---|---|---|
| Oslo | 681,067 | 717,710 |
Solve 3x + 7 = 22: 3x = 15, so x = 5. See https://example.com/a?b=1&c=2 for more.
"""

TEXTS = (ENGLISH, PYTHON, CHINESE, RUSSIAN, DATA)
