"""400 chat rows of mixed length (mean about 158 tokens with the benchmark tokenizer). usage: make_rows.py OUT.jsonl"""

import glob
import json
import random
import sys
import sysconfig
from pathlib import Path

random.seed(0)
files = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:40]
words = [w for f in files for w in Path(f).read_text(errors="ignore").split() if w.isalpha() and len(w) > 2]


def text(mu: float) -> str:
    return " ".join(random.choices(words, k=int(min(220, max(8, random.lognormvariate(mu, 0.7))))))


with open(sys.argv[1], "w") as out:
    for _ in range(400):
        messages = [{"role": "user", "content": text(3.6)}, {"role": "assistant", "content": text(4)}]
        out.write(json.dumps({"messages": messages}) + "\n")
