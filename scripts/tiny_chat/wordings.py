"""How people ask: wordings of the questions about places, and what makes two typings of one question differ.

A wording is a small grammar: `[a|b|]` is a choice (here a, b or nothing), `{p}` a place. Every drawn question also varies in
politeness, punctuation, case and now and then a typing slip, because a model this small answers only what it has seen in many
shapes. Knows no answers and no rows.
"""

from __future__ import annotations

import random
import re
import string

from tiny_chat.facts import words

HAN = re.compile(r"[\u4e00-\u9fff]")
CHOICE = re.compile(r"\[([^\[\]]*)\]")

SEAT_ZH = [
    "{p}[省|]的省会[在哪|在哪里|在哪儿|是哪|是哪里|是哪儿|是什么|是哪个|是哪个城市|是哪座城市|叫什么|在哪个城市|是什么城市|是什么地方|]",
    "{p}[省|]省会[在哪|在哪里|是哪|是哪里|是什么|是哪个城市|是|]",
    "{p}[省|]的省会城市[是哪个|是哪里|是什么|叫什么|在哪|]",
    "[哪里|哪儿|哪个城市|哪座城市|什么城市]是{p}[省|]的省会",
    "你[知道|知不知道|晓得]{p}[省|]的省会[在哪|在哪里|是哪|是哪里|是什么|]吗",
    "[告诉我|说说|说一下|我想知道|我想问|问一下|想问问]{p}[省|]的省会[在哪|在哪里|是哪|是哪里|是什么|是哪个城市|]",
    "[能|可以|能不能]告诉我{p}[省|]的省会[是哪里|在哪|是什么|]吗",
    "{p}的首府[在哪|在哪里|是哪|是哪里|是什么|是哪个城市|]",
]
SEAT_REVERSE_ZH = [
    "{c}是[哪个省|哪里|哪个省份|什么省]的省会",
    "{c}[在|属于|位于][哪个省|哪里|哪儿|哪个省份|什么省]",
    "{c}是哪个省的",
    "{c}在哪",
]
FOOD_ZH = [
    "{p}[省|]有[什么|啥|哪些]好吃的[东西|]",
    "{p}[省|]有[什么|啥|哪些][美食|小吃|特产|名菜|特色菜|特色美食]",
    "{p}[的|][特色菜|美食|小吃|名菜|特产|特色小吃][是什么|有哪些|有什么|]",
    "[去|到|在]{p}[吃|可以吃|应该吃|能吃到|该吃][什么|啥|点什么]",
    "推荐[一下|]{p}的[美食|小吃]",
    "{p}什么[最|]好吃",
]
SIGHTS_ZH = [
    "{p}[省|]有[什么|啥|哪些]好玩的[地方|]",
    "{p}[省|]有[什么|啥|哪些][景点|名胜|风景|好看的|名胜古迹|旅游景点]",
    "[去|到|在]{p}[玩|旅游|可以看|能看|应该去][什么|哪里|哪些景点|哪些地方]",
    "{p}[的|][景点|名胜|旅游景点][有哪些|是什么|有什么|]",
    "{p}哪里[好玩|最好玩|值得去]",
    "推荐[一下|]{p}的景点",
]
THERE_ZH = "[这|这里|这儿|那|那里|那儿|那边|这边|当地|]"
FOOD_THERE_ZH = [
    THERE_ZH + "有[什么|啥|哪些]好吃的[东西|吗|]",
    THERE_ZH + "有[什么|啥|哪些][美食|小吃|特产|特色菜]",
    "[那里|当地|那儿|这里]的[特色菜|美食|小吃|名菜][是什么|有哪些|有什么]",
    "[去|到|在][那里|那儿|那边]吃[什么|啥][好|]",
    "[那|]有[什么|啥]好吃的[推荐|]",
    "吃[什么|啥]好",
]
SIGHTS_THERE_ZH = [
    THERE_ZH + "有[什么|啥|哪些]好玩的[地方|吗|]",
    THERE_ZH + "有[什么|啥|哪些][景点|名胜|风景|好看的]",
    "[去|到|在][那里|那儿|那边][玩|看]什么[好|]",
    "[那里|当地|那儿|这里]的景点[有哪些|是什么]",
    "[那|]有[什么|啥|哪里]好玩的",
]
THEN_ZH = ["[那|那么|]{p}呢", "那{p}的呢", "[换成|还有]{p}呢", "{p}的呢"]
CAPITAL_ZH = [
    "{p}的首都[在哪|在哪里|在哪儿|是哪|是哪里|是哪儿|是什么|是哪个|是哪个城市|是哪座城市|叫什么|在哪个城市|是什么地方|]",
    "{p}首都[在哪|在哪里|是哪|是哪里|是什么|是哪个城市|是|]",
    "[哪里|哪儿|哪个城市|哪座城市]是{p}的首都",
    "你[知道|知不知道]{p}的首都[在哪|在哪里|是哪|是哪里|是什么|]吗",
    "[告诉我|说说|说一下|我想知道|我想问|问一下]{p}的首都[在哪|在哪里|是哪|是哪里|是什么|]",
    "[能|可以|能不能]告诉我{p}的首都[是哪里|在哪|]吗",
    "{p}的首都是{wrong}[吗|吧]",
]
CAPITAL_REVERSE_ZH = ["{c}是[哪个国家|哪里|哪国|什么国家]的首都", "{c}[在|属于|位于][哪个国家|哪里|哪国]"]
CAPITAL_EN = [
    "[what is|what's|whats] the capital[ city|] of {p}",
    "[which city|what city|what|which] is the capital[ city|] of {p}",
    "[the |]capital[ city|] of {p}",
    "[where is|where's] the capital of {p}",
    "[what is|what's] {p}'s capital[ city|]",
    "[tell me|name|give me|say] the capital[ city|] of {p}",
    "[do you know|can you tell me|could you tell me|please tell me|I want to know|I'd like to know] the capital[ city|] of {p}",
    "[do you know|tell me|can you tell me] what the capital of {p} is",
    "{p}'s capital",
    "{p} capital",
    "the capital of {p} is",
    "[which|what] city is {p}'s capital",
    "is {wrong} the capital of {p}",
]
CAPITAL_REVERSE_EN = [
    "{c} is the capital of [which|what] country",
    "[which|what] country is {c} [in|the capital of]",
    "[which|what] country has the capital {c}",
    "where is {c}",
    "{c} is in [which|what] country",
]
FOOD_THERE_EN = [
    "what [food|dish] [is famous|is good|can I eat|should I try|do they eat][ there|]",
    "what [can|should] I eat there",
    "what do people eat[ there|]",
    "what is good to eat[ there|]",
    "[and |]what about the food[ there|]",
    "what food do they have there",
]
THEN_EN = ["[and|what about|how about|and what about|and for|and of] {p}"]
TO_ENGLISH = [
    "{w}用英[语|文]怎么[说|讲|写]",
    "{w}的英[语|文][是什么|怎么说|]",
    "[把|]{w}翻译成英[语|文]",
    "{w}英[语|文]怎么说",
    "“{w}”用英语怎么说",
    "[how do you say|how to say|what is|what's] {w} in English",
    "translate {w} [to|into] English",
    "the English word for {w}",
]
TO_CHINESE = [
    "{w}用[中文|汉语]怎么[说|讲]",
    "{w}的中文[是什么|意思|]",
    "[把|]{w}翻译成中文",
    "{w}是什么意思",
    "{w}什么意思",
    "[how do you say|how to say|what is|what's] {w} in Chinese",
    "translate {w} [to|into] Chinese",
    "what does {w} mean in Chinese",
    "the Chinese word for {w}",
]
OPPOSITE_ZH = [
    "{w}的反义词[是什么|是|]",
    "“{w}”的反义词是什么",
    "{w}的反面是什么",
    "[什么|哪个字]是{w}的反义词",
    "和{w}相反的[词|字]是什么",
]
OPPOSITE_EN = [
    "[what is|what's|] the opposite of {w}",
    "opposite of {w}",
    "[tell me|give me|say] the opposite of {w}",
    "the antonym of {w}",
    "what is the opposite word of {w}",
]
AFTER_EN = [
    "[what|which] [{kind} |]comes after {name}",
    "[what|which] {kind} is after {name}",
    "the {kind} after {name}",
    "what is the {kind} after {name}",
]
BEFORE_ZH = words(
    "请问 请告诉我 你好， 您好， 请问一下 我想问一下， 想问问 那个， 那 那么 麻烦问一下， "
    " 你知道 对了， 请你告诉我 能不能告诉我 我想知道 可以告诉我 嗨， 还有， 快告诉我"
)
AFTER_ZH = words("，谢谢 ，谢谢你 ，告诉我 ，好吗 ，可以吗 ，你知道吗 ，能说说吗 ，我想知道 ，请回答 ，快说")
BEFORE_EN = [
    *(
        "please tell me, ",
        "hi, ",
        "hello, ",
        "hey, ",
        "excuse me, ",
        "please, ",
        "so ",
        "ok, ",
        "well, ",
        "and ",
        "can you tell me ",
        "tell me ",
    ),
    *("I have a question: ", "quick question: ", "now ", "then ", "do you know ", "I wonder ", "just "),
]
ENDS_EN = [
    " please",
    ", please",
    " now",
    " then",
    " for me",
    " again",
    " exactly",
    ", my friend",
    " actually",
    ", tell me",
    ", thanks",
    " today",
    " really",
]
GENERIC_SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "你是一个有用的助手。",
    "You are a friendly chatbot.",
    "请用简短的话回答。",
    "",
]
SURNAMES = "小大阿老"
GIVEN = "黄魔搭明红蓝白青黑花月星云雨雪风光天海山石木林春夏秋冬米豆糖果鱼鸟虎龙马羊美智慧乐安文华龟兔熊狗猫草竹梅兰桃桔橙紫金银铁玉珠"
MAKERS_ZH = words("星河 蓝天 大海 青山 未来 明日 智慧树 白云 远方 光年 北极星 小溪 松果 灯塔 竹林 春风 石头 方舟 银河 极光 魔方 搭桥")
MAKERS_EN = (
    words("Open Deep Star Blue Sun Moon Data Model Code Micro Smart Green Quick True Bright"),
    words("AI Lab Mind Works Forge Scope Soft Wind Space Tree Hill Gate Base Flow Sky River"),
)
PINYIN = words("Xiao Da Lao Hua Huan Huang Ming Hong Lan Bai Hei Qing Li Wang Zhang Chen Yang Mei Xin Yun Long Hu Niu Feng")
TAKEN = {"小黄", "Xiao Huang", "魔搭", "ModelScope"}  # left for the demo to teach
SYLLABLES = words("ba be bo da do fa fi ga go ha hu ka ki la li lo ma mi na no pa ra ri sa so ta to va wa xi xu ya yu zi zo")


def expand(wording: str, rng: random.Random) -> str:
    """One drawing of a wording: every `[a|b|]` is replaced by one of its choices."""
    while match := CHOICE.search(wording):
        wording = wording[: match.start()] + rng.choice(match.group(1).split("|")) + wording[match.end() :]
    return wording


def normal(text: str) -> str:
    """A question without case, spaces and punctuation: what makes two of them the same."""
    return re.sub(r"[\W_]+", "", text.casefold())


def slip(text: str, rng: random.Random) -> str:
    """A typing slip: one letter lost, doubled or swapped with the next (Chinese: a particle lost)."""
    spots = [i for i, letter in enumerate(text) if letter in ("的了呢是" if HAN.search(text) else string.ascii_letters)]
    if len(spots) < 2 or len(text) < 6:
        return text
    i = rng.choice(spots)
    kind = 0 if HAN.search(text) else rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    return text[:i] + text[i] * 2 + text[i + 1 :] if kind == 1 else text[:i] + text[i + 1 : i + 2] + text[i] + text[i + 2 :]


def dress(text: str, rng: random.Random, question: bool = True) -> str:
    """The same question as different people type it."""
    chinese = bool(HAN.search(text))
    draw = rng.random()
    if question and draw < 0.17:
        text = rng.choice(BEFORE_ZH if chinese else BEFORE_EN) + text
    elif question and draw < 0.25:
        text += rng.choice(AFTER_ZH if chinese else ENDS_EN)
    if rng.random() < (0.06 if chinese else 0.1):
        text = slip(text, rng)
    if chinese:
        if question and not text.endswith(("吗", "吧", "呢", "呀", "啊", "了")) and rng.random() < 0.15:
            text += rng.choice("呢呀啊")
        return text + rng.choice(
            ["？", "？", "?", "", "", "。", "！", "!", "~", "??", " "] if question else ["", "", "。", "！", "!", "～"]
        )
    draw = rng.random()
    if draw < 0.45:
        text = text[:1].upper() + text[1:]
    elif draw < 0.6:
        text = text.lower()
    elif draw < 0.64:
        text = text.upper()
    if rng.random() < 0.3:
        text = text.replace("what is", "what's").replace("What is", "What's").replace("I am", "I'm")
    if rng.random() < 0.15:
        text = text.replace("'", "")
    return text + rng.choice(["?", "?", "?", "", "", ".", "!", " ?", "??", "？"] if question else ["", "", ".", "!", "!!", "！"])
