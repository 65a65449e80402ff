"""Complete and chat without a server. Run: python examples/offline.py [MODEL]"""

import sys

from swiftlite import LLM, SamplingParams

llm = LLM(model=sys.argv[1] if len(sys.argv) > 1 else "tiny-chat")

prompts = ["浙江 -> 杭州\n安徽 -> 合肥\n四川 ->", "The capital of France is"]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, stop=["\n"])):
    print(repr(output.prompt), "->", repr(output.outputs[0].text))

(answer,) = llm.chat([{"role": "user", "content": "浙江的省会在哪？"}], SamplingParams(temperature=0, max_tokens=64))
print("浙江的省会在哪？", "->", answer.outputs[0].text)
