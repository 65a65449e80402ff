"""What tiny-chat knows about places, words and numbers: tables only, written by hand, checked by eye.

`corpus` turns them into rows. Nothing here knows about rows, wording or training.
"""

from __future__ import annotations


def words(text: str) -> list[str]:
    """A text's words."""
    return text.split()


# name, what it is, seat of government (None: it has none of its own), English name, English seat, two dishes, two sights
PROVINCES: list[tuple[str, str, str | None, str, str | None, str, str]] = [
    ("河北", "省", "石家庄", "Hebei", "Shijiazhuang", "驴肉火烧和缸炉烧饼", "承德避暑山庄和北戴河"),
    ("山西", "省", "太原", "Shanxi", "Taiyuan", "刀削面和过油肉", "云冈石窟和平遥古城"),
    ("辽宁", "省", "沈阳", "Liaoning", "Shenyang", "老边饺子和大连海鲜", "沈阳故宫和大连的海滩"),
    ("吉林", "省", "长春", "Jilin", "Changchun", "朝鲜族冷面和人参鸡", "长白山和净月潭"),
    ("黑龙江", "省", "哈尔滨", "Heilongjiang", "Harbin", "锅包肉和哈尔滨红肠", "冰雪大世界和中央大街"),
    ("江苏", "省", "南京", "Jiangsu", "Nanjing", "盐水鸭和阳澄湖大闸蟹", "中山陵和苏州园林"),
    ("浙江", "省", "杭州", "Zhejiang", "Hangzhou", "西湖醋鱼和龙井虾仁", "西湖和灵隐寺"),
    ("安徽", "省", "合肥", "Anhui", "Hefei", "臭鳜鱼和毛豆腐", "黄山和宏村"),
    ("福建", "省", "福州", "Fujian", "Fuzhou", "佛跳墙和沙县小吃", "鼓浪屿和武夷山"),
    ("江西", "省", "南昌", "Jiangxi", "Nanchang", "瓦罐汤和南昌拌粉", "庐山和滕王阁"),
    ("山东", "省", "济南", "Shandong", "Jinan", "煎饼卷大葱和糖醋鲤鱼", "泰山和趵突泉"),
    ("河南", "省", "郑州", "Henan", "Zhengzhou", "烩面和胡辣汤", "少林寺和龙门石窟"),
    ("湖北", "省", "武汉", "Hubei", "Wuhan", "热干面和武昌鱼", "黄鹤楼和武当山"),
    ("湖南", "省", "长沙", "Hunan", "Changsha", "剁椒鱼头和臭豆腐", "张家界和岳麓山"),
    ("广东", "省", "广州", "Guangdong", "Guangzhou", "早茶和白切鸡", "广州塔和丹霞山"),
    ("海南", "省", "海口", "Hainan", "Haikou", "文昌鸡和清补凉", "天涯海角和亚龙湾"),
    ("四川", "省", "成都", "Sichuan", "Chengdu", "火锅和麻婆豆腐", "九寨沟和都江堰"),
    ("贵州", "省", "贵阳", "Guizhou", "Guiyang", "酸汤鱼和肠旺面", "黄果树瀑布和西江苗寨"),
    ("云南", "省", "昆明", "Yunnan", "Kunming", "过桥米线和汽锅鸡", "丽江古城和石林"),
    ("陕西", "省", "西安", "Shaanxi", "Xi'an", "肉夹馍和羊肉泡馍", "兵马俑和华山"),
    ("甘肃", "省", "兰州", "Gansu", "Lanzhou", "牛肉面和手抓羊肉", "莫高窟和嘉峪关"),
    ("青海", "省", "西宁", "Qinghai", "Xining", "手抓羊肉和老酸奶", "青海湖和塔尔寺"),
    ("台湾", "省", "台北", "Taiwan", "Taipei", "卤肉饭和珍珠奶茶", "日月潭和阿里山"),
    ("内蒙古", "自治区", "呼和浩特", "Inner Mongolia", "Hohhot", "烤全羊和手把肉", "呼伦贝尔草原和响沙湾"),
    ("广西", "自治区", "南宁", "Guangxi", "Nanning", "螺蛳粉和桂林米粉", "桂林山水和北海银滩"),
    ("西藏", "自治区", "拉萨", "Tibet", "Lhasa", "酥油茶和糌粑", "布达拉宫和纳木错"),
    ("宁夏", "自治区", "银川", "Ningxia", "Yinchuan", "手抓羊肉和羊杂碎", "沙坡头和西夏王陵"),
    ("新疆", "自治区", "乌鲁木齐", "Xinjiang", "Urumqi", "大盘鸡和烤羊肉串", "天山天池和喀纳斯湖"),
    ("北京", "市", None, "Beijing", None, "烤鸭和炸酱面", "故宫和长城"),
    ("天津", "市", None, "Tianjin", None, "狗不理包子和大麻花", "五大道和天津之眼"),
    ("上海", "市", None, "Shanghai", None, "生煎包和小笼包", "外滩和豫园"),
    ("重庆", "市", None, "Chongqing", None, "重庆火锅和重庆小面", "洪崖洞和磁器口"),
    ("香港", "特别行政区", None, "Hong Kong", None, "港式点心和鱼蛋", "维多利亚港和太平山顶"),
    ("澳门", "特别行政区", None, "Macau", None, "葡式蛋挞和猪扒包", "大三巴牌坊和澳门塔"),
]

# English, Chinese, capital in English, in Chinese
COUNTRIES: list[tuple[str, str, str, str]] = [
    tuple(line.split("|"))  # type: ignore[misc]
    for line in """\
France|法国|Paris|巴黎
Germany|德国|Berlin|柏林
Italy|意大利|Rome|罗马
Spain|西班牙|Madrid|马德里
Portugal|葡萄牙|Lisbon|里斯本
the United Kingdom|英国|London|伦敦
Ireland|爱尔兰|Dublin|都柏林
the Netherlands|荷兰|Amsterdam|阿姆斯特丹
Belgium|比利时|Brussels|布鲁塞尔
Switzerland|瑞士|Bern|伯尔尼
Austria|奥地利|Vienna|维也纳
Poland|波兰|Warsaw|华沙
Czechia|捷克|Prague|布拉格
Hungary|匈牙利|Budapest|布达佩斯
Greece|希腊|Athens|雅典
Turkey|土耳其|Ankara|安卡拉
Russia|俄罗斯|Moscow|莫斯科
Ukraine|乌克兰|Kyiv|基辅
Sweden|瑞典|Stockholm|斯德哥尔摩
Norway|挪威|Oslo|奥斯陆
Denmark|丹麦|Copenhagen|哥本哈根
Finland|芬兰|Helsinki|赫尔辛基
Iceland|冰岛|Reykjavik|雷克雅未克
Romania|罗马尼亚|Bucharest|布加勒斯特
Bulgaria|保加利亚|Sofia|索非亚
Serbia|塞尔维亚|Belgrade|贝尔格莱德
Croatia|克罗地亚|Zagreb|萨格勒布
China|中国|Beijing|北京
Japan|日本|Tokyo|东京
South Korea|韩国|Seoul|首尔
North Korea|朝鲜|Pyongyang|平壤
Mongolia|蒙古国|Ulaanbaatar|乌兰巴托
India|印度|New Delhi|新德里
Pakistan|巴基斯坦|Islamabad|伊斯兰堡
Nepal|尼泊尔|Kathmandu|加德满都
Bangladesh|孟加拉国|Dhaka|达卡
Thailand|泰国|Bangkok|曼谷
Vietnam|越南|Hanoi|河内
Laos|老挝|Vientiane|万象
Cambodia|柬埔寨|Phnom Penh|金边
Malaysia|马来西亚|Kuala Lumpur|吉隆坡
the Philippines|菲律宾|Manila|马尼拉
Indonesia|印度尼西亚|Jakarta|雅加达
Iran|伊朗|Tehran|德黑兰
Iraq|伊拉克|Baghdad|巴格达
Saudi Arabia|沙特阿拉伯|Riyadh|利雅得
Qatar|卡塔尔|Doha|多哈
Kazakhstan|哈萨克斯坦|Astana|阿斯塔纳
Egypt|埃及|Cairo|开罗
Morocco|摩洛哥|Rabat|拉巴特
Kenya|肯尼亚|Nairobi|内罗毕
Ethiopia|埃塞俄比亚|Addis Ababa|亚的斯亚贝巴
Nigeria|尼日利亚|Abuja|阿布贾
Ghana|加纳|Accra|阿克拉
the United States|美国|Washington|华盛顿
Canada|加拿大|Ottawa|渥太华
Mexico|墨西哥|Mexico City|墨西哥城
Cuba|古巴|Havana|哈瓦那
Brazil|巴西|Brasilia|巴西利亚
Argentina|阿根廷|Buenos Aires|布宜诺斯艾利斯
Chile|智利|Santiago|圣地亚哥
Peru|秘鲁|Lima|利马
Colombia|哥伦比亚|Bogota|波哥大
Australia|澳大利亚|Canberra|堪培拉
New Zealand|新西兰|Wellington|惠灵顿""".splitlines()
]
COUNTRY_ALIASES: dict[str, list[str]] = {
    "the United Kingdom": ["the UK", "Britain", "England", "the United Kingdom"],
    "the United States": ["the US", "the USA", "America", "the United States"],
    "the Netherlands": ["the Netherlands", "Holland"],
    "the Philippines": ["the Philippines", "Philippines"],
}
# English -> (dishes in English, in Chinese)
COUNTRY_FOOD: dict[str, tuple[str, str]] = {
    "France": ("croissants and baguettes", "可颂和法棍"),
    "Germany": ("sausages and pretzels", "香肠和碱水面包"),
    "Italy": ("pizza and pasta", "披萨和意大利面"),
    "Spain": ("paella and ham", "海鲜饭和火腿"),
    "the United Kingdom": ("fish and chips", "炸鱼薯条"),
    "Switzerland": ("cheese and chocolate", "奶酪和巧克力"),
    "Japan": ("sushi and ramen", "寿司和拉面"),
    "South Korea": ("kimchi and bibimbap", "泡菜和石锅拌饭"),
    "India": ("curry and naan", "咖喱和烤饼"),
    "Thailand": ("pad thai and mango rice", "冬阴功汤和芒果饭"),
    "Vietnam": ("pho and spring rolls", "河粉和春卷"),
    "Russia": ("borscht and dumplings", "红菜汤和饺子"),
    "Turkey": ("kebab and baklava", "烤肉和果仁蜜饼"),
    "Mexico": ("tacos and burritos", "塔可和卷饼"),
    "the United States": ("burgers and apple pie", "汉堡和苹果派"),
    "China": ("dumplings and Peking duck", "饺子和北京烤鸭"),
}
WORDS: list[tuple[str, str]] = [
    tuple(pair.split("="))  # type: ignore[misc]
    for pair in (
        "苹果=apple 香蕉=banana 橙子=orange 葡萄=grape 西瓜=watermelon 水=water 茶=tea 咖啡=coffee 牛奶=milk 米饭=rice 面包=bread 鸡蛋=egg "
        "猫=cat 狗=dog 鸟=bird 鱼=fish 马=horse 牛=cow 羊=sheep 兔子=rabbit 老虎=tiger 大象=elephant 熊猫=panda 猴子=monkey "
        "太阳=sun 月亮=moon 星星=star 天空=sky 山=mountain 河=river 大海=sea 树=tree 花=flower 雨=rain 雪=snow 风=wind 火=fire "
        "红色=red 蓝色=blue 绿色=green 黄色=yellow 黑色=black 白色=white 书=book 笔=pen 桌子=table 椅子=chair 门=door 窗户=window "
        "房子=house 学校=school 医院=hospital 老师=teacher 学生=student 医生=doctor 朋友=friend 父亲=father 母亲=mother 爱=love "
        "时间=time 钱=money 音乐=music 电脑=computer 电话=phone 汽车=car 火车=train 飞机=plane 城市=city 国家=country 世界=world "
        "你好=hello 谢谢=thank you 再见=goodbye 早上好=good morning 晚安=good night 对不起=sorry 今天=today 明天=tomorrow"
    ).replace("thank you", "thank_you").replace("good ", "good_").split()
]  # fmt: skip
WORDS = [(zh, en.replace("_", " ")) for zh, en in WORDS]
OPPOSITES_ZH = [
    tuple(pair)
    for pair in words(
        "大小 高矮 长短 多少 快慢 冷热 黑白 上下 左右 前后 "
        "好坏 新旧 胖瘦 轻重 远近 早晚 开关 进出 真假 强弱 深浅 明暗 天地 美丑 甜苦 软硬 宽窄 胜负 哭笑 买卖"
    )
]
OPPOSITES_EN = [
    tuple(pair.split("/"))
    for pair in words(
        "big/small tall/short long/short fast/slow hot/cold black/white up/down left/right good/bad new/old fat/thin light/heavy far/near "
        "early/late open/closed in/out true/false strong/weak deep/shallow day/night happy/sad rich/poor easy/hard wet/dry "
        "clean/dirty full/empty high/low young/old thick/thin loud/quiet first/last yes/no love/hate"
    )
]
COLOURS = [  # Chinese thing, its colour, English thing, its colour
    ("天空", "蓝色", "the sky", "blue"),
    ("草", "绿色", "grass", "green"),
    ("雪", "白色", "snow", "white"),
    ("香蕉", "黄色", "a banana", "yellow"),
    ("血", "红色", "blood", "red"),
    ("煤", "黑色", "coal", "black"),
    ("柠檬", "黄色", "a lemon", "yellow"),
    ("番茄", "红色", "a tomato", "red"),
    ("牛奶", "白色", "milk", "white"),
    ("树叶", "绿色", "a leaf", "green"),
    ("巧克力", "棕色", "chocolate", "brown"),
    ("大海", "蓝色", "the sea", "blue"),
]
SOUNDS = [  # animal, what it says, in Chinese and in English
    ("猫", "喵喵", "cat", "meow"),
    ("狗", "汪汪", "dog", "woof"),
    ("牛", "哞哞", "cow", "moo"),
    ("羊", "咩咩", "sheep", "baa"),
    ("鸭子", "嘎嘎", "duck", "quack"),
    ("鸡", "喔喔", "rooster", "cock-a-doodle-doo"),
    ("青蛙", "呱呱", "frog", "ribbit"),
    ("猪", "哼哼", "pig", "oink"),
    ("蜜蜂", "嗡嗡", "bee", "buzz"),
]
LEGS = [
    ("猫", "四", "cat", "four"), ("狗", "四", "dog", "four"), ("鸟", "两", "bird", "two"), ("马", "四", "horse", "four"),
    ("蜘蛛", "八", "spider", "eight"), ("蚂蚁", "六", "ant", "six"), ("鸡", "两", "chicken", "two"),
]  # fmt: skip
DAYS_EN = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DAYS_ZH = words("星期一 星期二 星期三 星期四 星期五 星期六 星期日")
MONTHS_EN = words("January February March April May June July August September October November December")
DIGITS_ZH = "零一二三四五六七八九十"
NAMES_EN = words(
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mia Nick Olga Paul Rosa Sam Tina Victor Wendy Alice Bob Lily Tom "
    "Lucy Max Nora Oscar Ruby"
)
JOBS_EN = words("teacher doctor student cook writer nurse farmer singer painter driver")
CITIES_EN = words("Paris London Rome Berlin Madrid Vienna Tokyo Beijing Hangzhou Chengdu Oslo Lisbon")
