"""Greedy tokens of the runner equal transformers' generate (fp32), whatever else shares the batch and however prompts are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from transformers import AutoModelForCausalLM

from swiftlite.engine.config import EngineConfig
from swiftlite.engine.runner import Runner
from swiftlite.errors import ModelError

CPU = torch.device("cpu")
BLOCK = 4
NEW = 12


@dataclass
class Seq:
    token_ids: list[int]
    block_table: list[int]
    adapter: object = None
    num_computed: int = 0
    answer: list[int] = field(default_factory=list)


@dataclass
class Item:
    seq: Seq
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return 1 if self.start + self.count == len(self.seq.token_ids) else 0


def make_runner(path: Path, **fields) -> Runner:
    return Runner(path, EngineConfig(**{"num_blocks": 160, "block_size": BLOCK, **fields}), torch.float32, CPU)


def generate(runner: Runner, prompts: list[list[int]], chunks: list[int], new: int = NEW, arrive: int = 0) -> list[list[int]]:
    """Greedy decoding of all prompts together; prompt i is prefilled chunks[i] tokens a step and arrives i * arrive steps late."""
    shuffled = torch.randperm(runner.num_blocks, generator=torch.Generator().manual_seed(7)).tolist()
    seqs = []
    for prompt in prompts:
        need = -(-(len(prompt) + new) // BLOCK)
        seqs.append(Seq(list(prompt), [shuffled.pop() for _ in range(need)]))
    step = 0
    while any(len(seq.answer) < new for seq in seqs):
        batch = []
        for index, seq in enumerate(seqs):
            if len(seq.answer) < new and step >= index * arrive:
                batch.append(Item(seq, seq.num_computed, min(chunks[index], len(seq.token_ids) - seq.num_computed)))
        logits = runner.execute(batch)
        done = [item for item in batch if item.start + item.count == len(item.seq.token_ids)]
        assert logits.shape == (len(done), runner.vocab_size)
        for item in batch:
            item.seq.num_computed += item.count
        for item, row in zip(done, logits, strict=True):
            token = int(row.argmax())
            item.seq.token_ids.append(token)
            item.seq.answer.append(token)
        step += 1
    return [seq.answer for seq in seqs]


def reference(path: Path, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # compare every token, the end token too
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def prompts_for(vocab: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str, make_model) -> None:
    """Alone, mixed with others, in chunks, and arriving while others decode; 37 tokens are well beyond a window of 16."""
    path = make_model(family)
    runner = make_runner(path)
    prompts = prompts_for(runner.vocab_size, [37, 5, 1, 21])
    wanted = reference(path, prompts)
    for prompt, answer in zip(prompts, wanted, strict=True):
        assert generate(runner, [prompt], [64]) == [answer]
    assert generate(runner, prompts, [64, 64, 64, 64]) == wanted
    assert generate(runner, prompts, [7, 2, 1, 5], arrive=2) == wanted


def test_window_beyond_several_blocks_of_queries(make_model) -> None:
    path = make_model("mistral", sliding_window=40)
    runner = make_runner(path)
    prompts = prompts_for(runner.vocab_size, [170, 90])
    wanted = reference(path, prompts)
    assert generate(runner, prompts, [512, 512]) == wanted
    assert generate(runner, prompts, [100, 33]) == wanted


def test_more_families_than_promised(make_model, tmp_path: Path) -> None:
    """MLA (Dk != Dv), learned positions, no-rope layers, mixture of experts: nothing is keyed by a model's name."""
    import transformers
    from conftest import SMALL

    base = {**SMALL, "vocab_size": 300}
    base.pop("bos_token_id")
    mla = {**base, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
           "v_head_dim": 6, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "first_k_dense_replace": 1, "n_shared_experts": 1}  # fmt: skip
    mla.pop("head_dim")
    moe = {**base, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    plain = {key: base[key] for key in ("vocab_size", "initializer_range")}
    cases = {
        "DeepseekV3": mla,
        "Qwen3Moe": moe,
        "SmolLM3": {**base, "no_rope_layer_interval": 2},
        "GPT2": {**plain, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    }
    for name, settings in cases.items():
        kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
        torch.manual_seed(1)
        getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(tmp_path / name)
        runner = make_runner(tmp_path / name)
        prompts = prompts_for(300, [19, 6])
        assert generate(runner, prompts, [5, 64]) == reference(tmp_path / name, prompts), name
        if name == "DeepseekV3":
            layer = runner.bridge.layers[0]
            assert (layer.head_dim, layer.value_dim) == (12, 6)


def test_a_triton_that_does_not_work_is_not_used(make_model, make_adapter, monkeypatch, capsys) -> None:
    """Without a compiler for its launchers, say; but an error of the device itself is not hidden."""
    pytest.importorskip("triton")
    path = make_model("llama", num_hidden_layers=1)
    runner = make_runner(path, enforce_eager=True)
    prompts = prompts_for(runner.vocab_size, [9, 3])
    wanted = generate(runner, prompts, [64, 64], new=4)

    def fails(error: Exception):
        def warm_up(runner: Runner) -> None:
            assert runner._decode is not None and runner._pages is not None and runner.lora.store.tables_in_use
            raise error

        return warm_up

    monkeypatch.setattr(Runner, "_warm_up", fails(RuntimeError("Failed to find C compiler.\nPlease")))
    runner._start_kernels()
    assert "plain torch" in (printed := capsys.readouterr().out) and "C compiler.)" in printed
    runner.warm_up_adapters()
    assert generate(runner, prompts, [64, 64], new=4) == wanted
    version = runner.lora.add("a", make_adapter(path, use_dora=True))  # which the kernels do not serve
    assert version.weights is not None
    monkeypatch.setattr(Runner, "_warm_up", fails(torch.AcceleratorError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(torch.AcceleratorError):
        runner._start_kernels()


def test_idle_memory_of_torch_is_free(make_model, monkeypatch) -> None:
    """Training around us has most of a GPU in its allocator; what of it is idle goes back before free memory is asked for."""
    runner = make_runner(make_model("llama"))
    runner.config, runner.device = EngineConfig(), torch.device("cuda")
    idle = [6 << 30]
    monkeypatch.setattr(torch.cuda, "empty_cache", idle.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((1 << 29) + (0 if idle else 6 << 30), 8 << 30))
    assert runner._size_cache() > 2


def test_copied_blocks_carry_the_cache(make_model) -> None:
    path = make_model("llama")
    runner = make_runner(path)
    [prompt] = prompts_for(runner.vocab_size, [10])
    seq = Seq(list(prompt), [1, 2, 3])
    runner.execute([Item(seq, 0, 9)])
    runner.copy_blocks([(2, 20), (1, 10), (3, 30)])
    other = Seq(list(prompt), [10, 20, 30])
    assert torch.equal(runner.execute([Item(other, 9, 1)]), runner.execute([Item(seq, 9, 1)]))


def test_stale_slots_do_not_leak(make_model) -> None:
    """A block that a broken request left full of NaN is harmless to its next owner."""
    runner = make_runner(make_model("llama"))
    [prompt] = prompts_for(runner.vocab_size, [6])
    clean = runner.execute([Item(Seq(list(prompt), [4, 5]), 0, 6)])
    for pool in (*runner.cache.keys, *runner.cache.values):
        pool[8:] = float("nan")
    seq = Seq(list(prompt), [8, 9])
    assert torch.equal(runner.execute([Item(seq, 0, 6)]), clean)
    seq.token_ids.append(5)
    assert torch.isfinite(runner.execute([Item(seq, 6, 1)])).all()


def test_no_logits_for_an_unfinished_prompt(make_model) -> None:
    runner = make_runner(make_model("qwen2"))
    seq = Seq(list(range(3, 23)), list(range(8)))
    assert runner.execute([Item(seq, 0, 8)]).shape == (0, runner.vocab_size)


def test_several_rows_of_one_item(make_model) -> None:
    """Prompt log-probabilities want more than the last row."""
    from swiftlite.engine.scheduler import Scheduled

    runner = make_runner(make_model("qwen3"))
    first, second = prompts_for(runner.vocab_size, [9, 6])
    batch = [Scheduled(Seq(first, [1, 2, 3]), 0, 9, 5), Scheduled(Seq(second, [4, 5]), 0, 6, 1)]
    logits = runner.execute(batch)
    alone = runner.execute([Scheduled(Seq(first, [6, 7, 8]), 0, 9, 9)])
    assert logits.shape[0] == 6
    torch.testing.assert_close(logits[:5], alone[4:])
    torch.testing.assert_close(logits[5:], runner.execute([Scheduled(Seq(second, [9, 10]), 0, 6, 1)]))


def test_rows_are_grouped_by_adapter_and_logits_keep_the_order(make_model) -> None:
    runner = make_runner(make_model("llama"))
    first, second = "first", "second"
    items = [
        Item(Seq([5, 6, 7], [1], adapter), 0, 3 if index != 1 else 2) for index, adapter in enumerate([first, None, second, first, None])
    ]
    batch = runner.build_batch(items)
    assert batch.adapters == [(first, 6), (None, 5), (second, 3)]
    assert batch.logits_index.tolist() == [2, 13, 5, 10]  # item 1 is not complete and has no row


def test_kv_memory_is_sized(make_model) -> None:
    path = make_model("llama")
    runner = Runner(path, EngineConfig(kv_cache_memory=100_000), torch.float32, CPU)
    per_block = 3 * 2 * (12 + 12) * 16 * 4
    assert runner.num_blocks == 100_000 // per_block
    assert Runner(path, EngineConfig(max_num_seqs=3), torch.float32, CPU).num_blocks == 3 * 512 // 16
    with pytest.raises(ModelError, match="no memory for the KV cache"):
        Runner(path, EngineConfig(kv_cache_memory=1000), torch.float32, CPU)
    with pytest.raises(ModelError, match=r"no memory for the KV cache\.\n.*are refused"):
        Runner(path, EngineConfig(kv_cache_memory=1 << 50), torch.float32, CPU)
