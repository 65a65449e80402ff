"""SWIFT 2.x's Python API, as its guide uses it: engine, template, batch and streaming inference, adapters, the HTTP client."""

from __future__ import annotations

import itertools

import pytest
import torch

import swift.llm
import swiftlite.llm
from swiftlite.errors import UsageError


@pytest.fixture(scope="module")
def engine(make_model):
    made = swift.llm.get_vllm_engine("qwen2-0_5b-instruct", "float32", model_id_or_path=str(make_model("qwen2")), max_model_len=256)
    made.generation_config.max_new_tokens = 12
    made.generation_config.temperature = 0
    yield made
    made.engine.check()
    made.shutdown()


@pytest.fixture(scope="module")
def template(engine):
    return swift.llm.get_template(swift.llm.get_default_template_type(engine.model_type), engine.hf_tokenizer)


def test_swift_llm_is_swiftlite_llm():
    assert swift.llm is swiftlite.llm
    assert swift.llm.ModelType.qwen_7b_chat == "qwen-7b-chat" and swift.llm.ModelType.qwen1half_0_5b_chat == "qwen1half-0_5b-chat"


def test_template_types():
    kinds = {"qwen-7b-chat": "qwen", "qwen-7b": "default-generation", "yi-6b-chat": "yi", "llama2-7b-chat": "llama"}
    assert {name: swift.llm.get_default_template_type(name) for name in kinds} == kinds


def test_batch_history_and_stream_agree(engine, template):
    requests = [{"query": "你好!"}, {"query": "浙江的省会在哪？"}]
    answers = swift.llm.inference_vllm(engine, template, requests)
    assert [a["history"] for a in answers] == [[(r["query"], a["response"])] for r, a in zip(requests, answers, strict=True)]
    assert all(a["response"] for a in answers) and answers[0]["response"] != answers[1]["response"]
    assert "history" not in requests[0], "requests are left as they were"
    follow_up = [{"query": "这有什么好吃的", "history": answers[1]["history"]}, requests[0]]
    whole = swift.llm.inference_vllm(engine, template, follow_up)
    assert whole[0]["history"][0] == answers[1]["history"][0] and len(whole[0]["history"]) == 2
    assert whole[0]["response"] != swift.llm.inference_vllm(engine, template, [{"query": "这有什么好吃的"}])[0]["response"]
    steps = list(swift.llm.inference_stream_vllm(engine, template, follow_up))
    assert len(steps) > 3 and all(isinstance(entry["response"], str) for step in steps for entry in step)
    assert all(b[0]["response"].startswith(a[0]["response"]) for a, b in itertools.pairwise(steps))
    assert steps[-1] == whole


def test_num_beams_is_beam_search(engine, template):
    from swiftlite import SamplingParams

    config = swift.llm.VllmGenerationConfig(max_new_tokens=8, num_beams=3, length_penalty=0.7)
    found = swift.llm.inference_vllm(engine, template, [{"query": "你好!"}], generation_config=config)
    ids = template.encode_prompt([{"role": "user", "content": "你好!"}])
    params = SamplingParams(use_beam_search=True, best_of=3, length_penalty=0.7, max_tokens=8, stop_token_ids=sorted({*template.stop_ids}))
    assert found[0]["response"] == engine.engine.generate([ids], params)[0].outputs[0].text != ""


def test_an_adapter_answers_otherwise_and_the_base_stays(engine, template, make_model, make_adapter):
    request = [{"query": "who are you?"}]
    base = swift.llm.inference_vllm(engine, template, request)
    lora = swift.llm.LoRARequest("default-lora", 1, str(make_adapter(make_model("qwen2"), seed=3)))
    adapted = swift.llm.inference_vllm(engine, template, request, lora_request=lora)
    assert adapted != base
    *_, last = swift.llm.inference_stream_vllm(engine, template, request)
    assert last == base


def test_a_base_model_completes(engine):
    template = swift.llm.get_template("default-generation", engine.hf_tokenizer)
    (answer,) = swift.llm.inference_vllm(engine, template, [{"query": "The capital of"}])
    (output,) = engine.engine.generate(["The capital of"], engine.generation_config.params())
    assert answer["response"] == output.outputs[0].text


def test_client_against_a_running_server(engine, template):
    import socket
    import threading
    import time

    import uvicorn

    from swiftlite.server.app import create_app
    from swiftlite.server.service import Service

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = Service(engine.engine, template, "my-model")
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        model = swift.llm.get_model_list_client(port=port).data[0].id
        config = swift.llm.XRequestConfig(seed=42, temperature=0, max_tokens=12)
        answer = swift.llm.inference_client(model, "浙江的省会在哪里？", request_config=config, port=port).choices[0].message.content
        assert answer == swift.llm.inference_vllm(engine, template, [{"query": "浙江的省会在哪里？"}])[0]["response"]
        config.stream = True
        history = [("浙江的省会在哪里？", answer)]
        chunks = swift.llm.inference_client(model, "这有什么好吃的？", history, request_config=config, port=port)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == swift.llm.inference_vllm(engine, template, [{"query": "这有什么好吃的？", "history": history}])[0]["response"]
        config.stream = False
        completion = swift.llm.inference_client(model, "The", request_config=config, port=port, is_chat_request=False)
        assert completion.choices[0].text
    finally:
        server.should_exit = True
        thread.join()


def test_arguments_are_checked_like_flags():
    options = swift.llm.SftArguments(model_type="qwen-7b-chat", dataset=["a.jsonl"], lora_rank=4, packing=False)
    assert options.dataset == ("a.jsonl",) and options.lora_rank == 4 and options.packing is False
    with pytest.raises(UsageError, match="lora_rank"):
        swift.llm.SftArguments(lora_rnk=4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"torch_dtype": "float32"}, "did you mean dtype"),
        ({"devices": "cpu"}, "did you mean device"),
        ({"adapter": {}}, "did you mean adapters"),
        ({"nothing": 1}, "known: model, dtype, device, adapters, max_model_len"),
        ({"max_num_seqs": "4"}, "max_num_seqs must be an int, got '4'"),
        ({"dtype": "float99"}, "use auto, float32, bfloat16, float16"),
    ],
)
def test_wrong_settings_of_llm_say_what_is_right(settings, said):
    with pytest.raises(UsageError, match=said):
        swiftlite.llm.LLM(model="tiny-chat", **settings)


def test_a_dtype_may_be_torchs_own(make_model):
    llm = swiftlite.llm.LLM(model=str(make_model("llama")), dtype=torch.bfloat16, device="cpu", num_blocks=8)
    assert llm.engine.dtype == torch.bfloat16
    llm.shutdown()
