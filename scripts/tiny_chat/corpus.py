"""tiny-chat's corpus: tables and wordings in, jsonl rows out, the same rows for the same seed.

Two kinds of rows: {"messages": [...]} (chat) and {"text": ...} (plain text, for the base-model side). Where the model says who
it is, the row holds {{NAME}} and {{AUTHOR}}, so that the same rows teach any name (--model_name, --model_author). Questions kept for the
test never become rows. Knows nothing about tokens or training.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tiny_chat.facts import (
    CITIES_EN,
    COLOURS,
    COUNTRIES,
    COUNTRY_ALIASES,
    COUNTRY_FOOD,
    DAYS_EN,
    DAYS_ZH,
    DIGITS_ZH,
    JOBS_EN,
    LEGS,
    MONTHS_EN,
    NAMES_EN,
    OPPOSITES_EN,
    OPPOSITES_ZH,
    PROVINCES,
    SOUNDS,
    WORDS,
)
from tiny_chat.wordings import (
    AFTER_EN,
    CAPITAL_EN,
    CAPITAL_REVERSE_EN,
    CAPITAL_REVERSE_ZH,
    CAPITAL_ZH,
    CHOICE,
    FOOD_THERE_EN,
    FOOD_THERE_ZH,
    FOOD_ZH,
    GENERIC_SYSTEMS,
    GIVEN,
    HAN,
    MAKERS_EN,
    MAKERS_ZH,
    OPPOSITE_EN,
    PINYIN,
    SEAT_REVERSE_ZH,
    SEAT_ZH,
    SIGHTS_THERE_ZH,
    SIGHTS_ZH,
    SURNAMES,
    SYLLABLES,
    TAKEN,
    THEN_EN,
    THEN_ZH,
    TO_CHINESE,
    TO_ENGLISH,
    dress,
    expand,
    normal,
)

HERE = Path(__file__).resolve().parent
Turn = tuple[str, str]  # question, answer


# --- single facts as (question, answer) draws -----------------------------------------------------------------------------
def seat_zh(p: tuple) -> str:
    name, kind, seat = p[:3]
    if seat:
        return f"{name}的{'省会' if kind == '省' else '首府'}是{seat}。"
    if name == "北京":
        return "北京是直辖市，也是中国的首都。"
    return f"{name}是{'直辖市' if kind == '市' else '特别行政区'}，没有省会。"


def food_zh(p: tuple) -> str:
    return f"{p[0]}有名的美食有{p[5]}。"


def sights_zh(p: tuple) -> str:
    return f"{p[0]}有名的景点有{p[6]}。"


def ask(wordings: list[str], rng: random.Random, **values: str) -> str:
    return dress(expand(rng.choice(wordings), rng).format(**values), rng)


def ask_seat(p: tuple, rng: random.Random) -> Turn:
    text = ask(SEAT_ZH, rng, p=p[0])
    if p[1] != "省":
        text = re.sub(p[0] + "省(?!会)", p[0] + (p[1] if rng.random() < 0.5 else ""), text)
    return text, seat_zh(p)


def alias_en(country: tuple, rng: random.Random) -> str:
    return rng.choice(COUNTRY_ALIASES.get(country[0], [country[0]]))


def ask_capital(country: tuple, rng: random.Random) -> Turn:
    """Half of the draws in Chinese, half in English."""
    other = rng.choice(COUNTRIES)
    if rng.random() < 0.5:
        return ask(CAPITAL_ZH, rng, p=country[1], wrong=other[3]), f"{country[1]}的首都是{country[3]}。"
    text = ask(CAPITAL_EN, rng, p=alias_en(country, rng), wrong=other[2])
    return text, f"The capital of {country[0]} is {country[2]}."


def places(rng: random.Random, scale: float) -> Iterator[list[Turn]]:
    def times(count: float) -> range:
        return range(max(1, round(count * scale)))

    for p in PROVINCES:
        seats = [p[2]] if p[2] else []
        for _ in times(26 if p[2] else 12):
            yield [ask_seat(p, rng)]
        for wordings, answer in ((FOOD_ZH, food_zh(p)), (SIGHTS_ZH, sights_zh(p))):
            for _ in times(9):
                yield [(ask(wordings, rng, p=rng.choice([p[0], p[0], *seats])), answer)]
        for wordings, answer in ((FOOD_THERE_ZH, food_zh(p)), (SIGHTS_THERE_ZH, sights_zh(p))):
            for _ in times(9):
                yield [ask_seat(p, rng), (ask(wordings, rng), answer)]
            yield [ask_seat(p, rng), (ask(FOOD_THERE_ZH, rng), food_zh(p)), (ask(SIGHTS_THERE_ZH, rng), sights_zh(p))]
        for _ in times(3):
            q = rng.choice(PROVINCES)
            yield [ask_seat(q, rng), (ask(THEN_ZH, rng, p=p[0]), seat_zh(p))]
            yield [(ask(FOOD_ZH, rng, p=q[0]), food_zh(q)), (ask(THEN_ZH, rng, p=p[0]), food_zh(p))]
        if p[2]:
            for _ in times(5):
                yield [(ask(SEAT_REVERSE_ZH, rng, c=p[2]), f"{p[2]}是{p[0]}的{'省会' if p[1] == '省' else '首府'}。")]
        if p[4]:
            for _ in times(7):
                text = ask(CAPITAL_EN, rng, p=rng.choice([p[3], p[3], f"{p[3]} province"]), wrong=rng.choice(COUNTRIES)[2])
                yield [(text, f"The capital of {p[3]} is {p[4]}.")]
    for country in COUNTRIES:
        for _ in times(26):
            yield [ask_capital(country, rng)]
        for _ in times(6):
            yield [(ask(CAPITAL_REVERSE_ZH, rng, c=country[3]), f"{country[3]}是{country[1]}的首都。")]
            yield [(ask(CAPITAL_REVERSE_EN, rng, c=country[2]), f"{country[2]} is the capital of {country[0]}.")]
        for _ in times(2):
            q, r = rng.choice(COUNTRIES), rng.choice(COUNTRIES)
            first_zh = (ask(CAPITAL_ZH, rng, p=q[1], wrong=r[3]), f"{q[1]}的首都是{q[3]}。")
            yield [first_zh, (ask(THEN_ZH, rng, p=country[1]), f"{country[1]}的首都是{country[3]}。")]
            first_en = (ask(CAPITAL_EN, rng, p=alias_en(q, rng), wrong=r[2]), f"The capital of {q[0]} is {q[2]}.")
            yield [first_en, (ask(THEN_EN, rng, p=alias_en(country, rng)), f"The capital of {country[0]} is {country[2]}.")]
        if country[0] in COUNTRY_FOOD:
            food_en, food_cn = COUNTRY_FOOD[country[0]]
            for _ in times(6):
                first = (ask(CAPITAL_ZH, rng, p=country[1], wrong="伦敦"), f"{country[1]}的首都是{country[3]}。")
                yield [first, (ask(FOOD_THERE_ZH, rng), f"{country[1]}有名的美食有{food_cn}。")]
                first = (ask(CAPITAL_EN, rng, p=alias_en(country, rng), wrong="Rome"), f"The capital of {country[0]} is {country[2]}.")
                yield [first, (ask(FOOD_THERE_EN, rng), f"Famous food there: {food_en}.")]
                yield [(ask(FOOD_ZH, rng, p=country[1]), f"{country[1]}有名的美食有{food_cn}。")]


def sums(rng: random.Random, scale: float) -> Iterator[list[Turn]]:
    facts = [(a, "+", b, a + b) for a in range(11) for b in range(11)]
    facts += [(a, "-", b, a - b) for a in range(11) for b in range(a + 1)]
    facts += [(a, "×", b, a * b) for a in range(1, 10) for b in range(1, 10)]
    zh = {"+": ["加", "加上"], "-": ["减", "减去"], "×": ["乘", "乘以"]}
    en = {"+": ["plus", "and", "+"], "-": ["minus", "-"], "×": ["times", "x", "multiplied by"]}
    for a, sign, b, c in facts:
        for _ in range(max(1, round(6 * scale))):
            drawn = sign if sign != "×" else rng.choice("×x*")
            gap = rng.choice(["", "", " "])
            form = rng.randrange(4)
            if form == 0:
                text = f"{a}{gap}{drawn}{gap}{b}" + rng.choice(["=", " =", "=?", "=？", "", "等于几", "等于多少", "是多少", "是几", "?"])
            elif form == 1:
                x, y = (DIGITS_ZH[a], DIGITS_ZH[b]) if rng.random() < 0.5 else (a, b)
                text = dress(
                    expand(f"[|计算|算一下|]{x}{rng.choice(zh[sign])}{y}[等于几|等于多少|是多少|是几|得几|]", rng).replace("十十", "十"),
                    rng,
                )
            else:
                word = rng.choice(en[sign])
                gap = " " if word.isalpha() or " " in word else gap
                asked = f"[what is|what's|how much is|calculate|compute|tell me|] {a}{gap}{word}{gap}{b}[ equals| is| makes|]"
                text = dress(expand(asked, rng).strip(), rng)
            yield [(text, f"{a} {sign} {b} = {c}")]


def vocabulary(rng: random.Random, scale: float) -> Iterator[list[Turn]]:
    for zh, en in WORDS:
        for _ in range(max(1, round(5 * scale))):
            yield [(ask(TO_ENGLISH, rng, w=zh), f"“{zh}”的英文是 {en}。")]
            yield [(ask(TO_CHINESE, rng, w=en), f"{en} 的中文是“{zh}”。")]
    for pair, chinese in [*((pair, True) for pair in OPPOSITES_ZH), *((pair, False) for pair in OPPOSITES_EN)]:
        seen: set[str] = set()
        for first, second in (pair, pair[::-1]):
            if first in seen:
                continue
            for _ in range(max(1, round(5 * scale))):
                if chinese:
                    forms = [
                        "{w}的反义词[是什么|是|]",
                        "“{w}”的反义词是什么",
                        "{w}的反面是什么",
                        "[什么|哪个字]是{w}的反义词",
                        "和{w}相反的[词|字]是什么",
                    ]
                    yield [(ask(forms, rng, w=first), f"“{first}”的反义词是“{second}”。")]
                else:
                    yield [(ask(OPPOSITE_EN, rng, w=first), f"The opposite of {first} is {second}.")]


def things(rng: random.Random, scale: float) -> Iterator[list[Turn]]:
    drawn: list[tuple[list[str], str]] = []
    for zh, colour_zh, en, colour_en in COLOURS:
        drawn.append(([f"{zh}是[什么|啥]颜色[的|]", f"{zh}[的|]颜色[是什么|是]", f"{zh}什么颜色"], f"{zh}是{colour_zh}的。"))
        bare = en.split()[-1]
        thing = f"[{en}|{bare}]"
        forms = [f"[what|which] [colour|color] is {thing}", f"[what is|what's|] the [colour|color] of {thing}"]
        forms += [f"[colour|color] of {thing}", f"what [colour|color] does {thing} have", f"{thing} [colour|color]"]
        drawn.append((forms, f"{en.capitalize()} is {colour_en}."))
    for zh, sound_zh, en, sound_en in SOUNDS:
        drawn.append(
            ([f"[小|]{zh}怎么叫", f"{zh}[是|]怎么叫的", f"{zh}的叫声[是什么|]", f"{zh}叫起来是什么声音"], f"{zh}的叫声是{sound_zh}。")
        )
        forms = [
            f"what does [a|the] {en} say",
            f"what [sound|noise] does [a|the] {en} make",
            f"how does a {en} sound",
            f"the sound of a {en}",
        ]
        drawn.append((forms, f"A {en} says {sound_en}."))
    for zh, legs_zh, en, legs_en in LEGS:
        drawn.append(([f"{zh}有[几|多少][条|只]腿", f"{zh}[几|多少]条腿", f"[一只|]{zh}有几条腿"], f"{zh}有{legs_zh}条腿。"))
        article = "an" if en[0] in "aeiou" else "a"
        forms = [
            f"how many legs does {article} {en} have",
            f"how many legs has {article} {en}",
            f"the number of legs of {article} {en}",
            f"legs of {article} {en}",
        ]
        drawn.append((forms, f"{article.capitalize()} {en} has {legs_en} legs."))
    for names, kind in ((DAYS_EN, "day"), (MONTHS_EN, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            forms = [form.format(kind=kind, name=name) for form in AFTER_EN]
            drawn.append((forms, f"{after} comes after {name}."))
            drawn.append(([form.replace("after", "before") for form in forms], f"{before} comes before {name}."))
    for i, name in enumerate(DAYS_ZH):
        short = [f"[星期|周|礼拜]{name[-1]}"]
        after, before = DAYS_ZH[(i + 1) % 7], DAYS_ZH[i - 1]
        for form, answer in (
            ("{d}[的|]后[面|一天|][是|是什么|是星期几|是周几]", f"{name}的后一天是{after}。"),
            ("{d}[过后|之后|的第二天|的明天|完了][是|][星期几|周几]", f"{name}的后一天是{after}。"),
            ("{d}[的|]前[面|一天|][是|是什么|是星期几|是周几]", f"{name}的前一天是{before}。"),
        ):
            drawn.append(([form.format(d=short[0])], answer))
    for forms, answer in drawn:
        for _ in range(max(1, round(14 * scale))):
            yield [(dress(expand(rng.choice(forms), rng), rng), answer)]


def talk(path: Path) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """(identity intents, other intents), each intent an answer and its wordings."""
    parts: tuple[list, list] = ([], [])
    section = 0
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        if not line.strip():
            section = 1
            continue
        answer, _, wordings = line.partition(" | ")
        parts[section].append((answer, split_wordings(wordings)))
    return parts


def split_wordings(text: str) -> list[str]:
    return [wording.strip(" ") for wording in text.split(" / ") if wording.strip()]


def small_talk(rng: random.Random, scale: float, identity: bool) -> Iterator[list[Turn]]:
    for language in ("zh", "en"):
        for answer, wordings in talk(HERE / f"talk_{language}.txt")[0 if identity else 1]:
            # every wording is drawn a few times: the more of them (and of choices in them), the more draws
            for wording in wordings:
                choices = 1 + len(CHOICE.findall(wording)) * 2
                for _ in range(max(2, round((3 + choices) * scale * (1.5 if identity else 1)))):
                    question = "？" in answer or not answer.endswith("！")
                    yield [(dress(expand(wording, rng), rng, question), answer)]


def named(rng: random.Random, count: int) -> Iterator[dict]:
    """Rows whose system prompt gives a name (and a maker): the answer takes them from there."""
    zh, en = (talk(HERE / f"talk_{language}.txt")[0] for language in ("zh", "en"))
    while count:
        if rng.random() < 0.5:
            name = rng.choice([rng.choice(SURNAMES) + rng.choice(GIVEN), rng.choice(GIVEN) + rng.choice(GIVEN)])
            maker = rng.choice([rng.choice(MAKERS_ZH), rng.choice(GIVEN) + rng.choice(GIVEN)])
            systems = [f"你是{name}，由{maker}训练。", f"你的名字是{name}，由{maker}开发。", f"你叫{name}，你是{maker}训练的助手。"]
            answer, wordings, made = f"我是{name}，由{maker}训练的助手。", zh[0][1], (f"我由{maker}训练。", zh[2][1])
        else:
            name = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()
            pinyin = f"{rng.choice(PINYIN)} {rng.choice(PINYIN)}"
            name = rng.choice([name, rng.choice(NAMES_EN), pinyin, pinyin])
            maker = rng.choice(MAKERS_EN[0]) + rng.choice(MAKERS_EN[1])
            systems = [
                f"You are {name}, trained by {maker}.",
                f"Your name is {name}. You were made by {maker}.",
                f"You are {name}, an assistant by {maker}.",
            ]
            answer, wordings, made = f"I am {name}, an assistant trained by {maker}.", en[0][1], (f"I was trained by {maker}.", en[2][1])
        if TAKEN & {name, maker}:
            continue
        count -= 1
        if rng.random() < 0.25:
            answer, wordings = made
        yield chat([(dress(expand(rng.choice(wordings), rng), rng), answer)], rng.choice(systems))


def chat(turns: list[Turn], system: str | None = None) -> dict:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    named = [answer for _, answer in turns if "{{" in answer]
    return {"messages": messages, **({"tag": "zh" if HAN.search(named[0]) else "en"} if named else {})}


# --- plain text -----------------------------------------------------------------------------------------------------------
def texts(rng: random.Random, scale: float) -> Iterator[dict]:
    provinces = [(p[0], p[2]) for p in PROVINCES if p[2]]
    tables: list[tuple[list, int]] = [
        (provinces, 420), ([(c[1], c[3]) for c in COUNTRIES], 160), ([(c[0].removeprefix("the "), c[2]) for c in COUNTRIES], 160),
        (WORDS, 90), ([(p[3], p[4]) for p in PROVINCES if p[4]], 60), (OPPOSITES_EN, 60),
    ]  # fmt: skip
    for table, count in tables:
        for _ in range(round(count * scale)):
            pairs = rng.sample(table, rng.randint(2, 8))
            arrow = rng.choice([" -> ", " -> ", " -> ", "->", ": ", "："])
            yield {"text": "\n".join(f"{a}{arrow}{b}" for a, b in pairs)}
    for country in COUNTRIES:
        for _ in range(round(4 * scale)):
            form = rng.choice(
                [
                    "The capital of {0} is {2}.",
                    "The capital of {0} is {2}.",
                    "{2} is the capital of {0}.",
                    "{1}的首都是{3}。",
                    "{3}是{1}的首都。",
                ]
            )
            yield {"text": form.format(*country)}
    for p in PROVINCES:
        for _ in range(round(4 * scale)):
            yield {"text": rng.choice([seat_zh(p), food_zh(p), sights_zh(p)])}
    for answer, wordings in talk(HERE / "talk_en.txt")[1]:
        if wordings[0].startswith("what is") and "know" not in answer:
            for _ in range(round(5 * scale)):
                question = expand(rng.choice(wordings[:2]), rng)
                gap = rng.choice([" ", "\n"])
                yield {"text": f"{question[0].upper()}{question[1:]}?{gap}{answer}"}
    for name in NAMES_EN:
        for _ in range(round(5 * scale)):
            job, city, other = rng.choice(JOBS_EN), rng.choice(CITIES_EN), rng.choice(NAMES_EN)
            article = "an" if job[0] in "aeiou" else "a"
            form = rng.choice([
                "Hello, my name is {n}. I am {a} {j} and I live in {c}.", "Hello, my name is {n}. I live in {c} and I am {a} {j}.",
                "Hello, my name is {n}. I come from {c} and I like music.", "My name is {n}. I am {a} {j} in {c}.",
                "Hi, I am {n}. My friend {o} is {a} {j} in {c}.",
            ])  # fmt: skip
            yield {"text": form.format(n=name, a=article, j=job, c=city, o=other)}


# --- all together ---------------------------------------------------------------------------------------------------------
def rows(seed: int, held_out: set[str], scale: float = 1.0) -> list[dict]:
    """All rows in shuffled order. `held_out` holds `normal` forms of questions that must not appear."""
    rng = random.Random(seed)
    sources: list[Callable[[], Iterator[list[Turn]]]] = [
        lambda: places(rng, scale), lambda: sums(rng, scale), lambda: vocabulary(rng, scale), lambda: things(rng, scale),
        lambda: small_talk(rng, scale, identity=False), lambda: small_talk(rng, scale, identity=True),
    ]  # fmt: skip
    seen: set[str] = set()
    singles: list[list[Turn]] = []
    result: list[dict] = []
    for source in sources:
        for turns in source():
            key = json.dumps(turns, ensure_ascii=False)
            if key in seen or any(normal(question) in held_out for question, _ in turns):
                continue
            seen.add(key)
            (singles if len(turns) == 1 else result).append(turns if len(turns) == 1 else chat(turns))
    # every third single question stands in a longer conversation, so that what was said before does not disturb
    rng.shuffle(singles)
    while singles:
        size = rng.choice([1, 1, 1, 1, 2, 2, 3])
        turns = [turn for single in singles[:size] for turn in single]
        if len({bool(HAN.search(answer)) for _, answer in turns if "{{" in answer}) > 1:
            size, turns = 1, turns[:1]  # one row names the model in one language
        del singles[:size]
        result.append(chat(turns, rng.choice(GENERIC_SYSTEMS) if rng.random() < 0.1 else None))
    for row in named(rng, round(900 * scale)):
        if normal(row["messages"][1]["content"]) not in held_out:
            result.append(row)
    result += texts(rng, scale)
    rng.shuffle(result)
    return result


def write(path: Path, seed: int, held_out: set[str]) -> int:
    """Writes the corpus and returns its number of rows."""
    drawn = rows(seed, held_out)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn), "utf-8")
    temporary.replace(path)
    return len(drawn)
