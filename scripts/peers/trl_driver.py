"""TRL's SFTTrainer: LoRA r=16 on all linears, bfloat16 base, no gradient checkpointing, AdamW at a constant rate.

Arguments as one JSON object: model, rows, packing, batch, steps, rate, out. `rows` is a jsonl of input_ids and labels in the order
to train in; with packing a line is a whole step, and seq_lengths says where its rows end.
"""

import itertools
import json
import sys
import time
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def peak_gib():
    """This program's own peak; ru_maxrss would be inherited from a large parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


job = json.loads(sys.argv[1])
times = StepTimes()
trainer = SFTTrainer(
    job["model"],
    args=SFTConfig(
        output_dir=job["out"] + "-trl", max_steps=job["steps"], per_device_train_batch_size=1 if job["packing"] else job["batch"],
        gradient_checkpointing=False, bf16=True, use_cpu=True, report_to=[], max_length=None, logging_steps=1, save_strategy="no",
        learning_rate=job["rate"], lr_scheduler_type="constant", weight_decay=0.0, model_init_kwargs={"dtype": "bfloat16"},
        train_sampling_strategy="sequential", padding_free=job["packing"], dataset_kwargs={"skip_prepare_dataset": True},
    ),
    train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[times],
)  # fmt: skip
trainer.train()
history = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
seen = [entry["num_tokens"] for entry in history]
tokens = sum(b - a for a, b in itertools.pairwise(seen))  # the first step warms up
report = {
    "tokens_per_s": tokens / sum(times.seconds[1:]) if tokens else None,
    "memory_gib": peak_gib(),
    "tokens": seen[-1],
    "losses": [entry["loss"] for entry in history],
}
with open(job["out"], "w") as file:
    json.dump(report, file)
