"""Ask a running `swift deploy` with the OpenAI SDK: every model it serves, then one streamed answer with history.

Run: swift deploy --model tiny-chat &  then  python examples/openai_client.py [BASE_URL]
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="EMPTY")

models = [model.id for model in client.models.list().data]
for name in models:
    answer = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "who are you?"}], temperature=0, max_tokens=64
    )
    print(f"{name}: {answer.choices[0].message.content}")

messages = [{"role": "user", "content": "浙江的省会在哪？"}]
first = client.chat.completions.create(model=models[0], messages=messages, temperature=0, max_tokens=64).choices[0].message
messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": "这有什么好吃的？"}]
for chunk in client.chat.completions.create(model=models[0], messages=messages, temperature=0, max_tokens=64, stream=True):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
